"""What a mask generator says of classes, in the words of a test vocabulary, and its part in the ensemble of MaskCLIP++
(arXiv 2412.11464, equation 4)."""

from __future__ import annotations

from dataclasses import replace

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ovseg_d2.data.vocabulary import training_vocabulary
from ovseg_d2.modeling.mask_classification.ensemble import (
    class_table,
    floored_logits,
    geometric_ensemble,
    translated_logits,
    with_void,
)
from ovseg_d2.structures import MaskProposals, Vocabulary

NAMES = ("none", "maskclippp")
_NAME, _DATASET = "MODEL.OVSEG.ENSEMBLE.NAME", "MODEL.OVSEG.PROPOSALS.DATASET"


class GeneratorClasses:
    """A generator's class logits and CLIP's -> logits of both, with "no object"; for any test vocabulary."""

    def __init__(
        self,
        *,
        trained: Vocabulary | None = None,
        closed: bool = False,
        name: str = "none",
        alpha: float = 1.0,
        beta: float = 1.0,
    ) -> None:
        """
        Args:
            trained: the classes of the generator's training; None where neither a closed generator nor the ensemble
                asks for them.
            closed: its logits are those of its training's classes, whatever the test's are.
            name: of the ensemble: "none", CLIP alone names masks; "maskclippp", the geometric one. "No object" is the
                generator's in both.
            alpha, beta: CLIP's exponents for classes that the generator's training knew (1 - gamma), and for others.

        Raises:
            ValueError: no such ensemble, an exponent outside [0, 1], or no classes where they are needed.
        """
        if name not in NAMES:
            raise ValueError(f"{_NAME} is {name!r}; allowed are {', '.join(NAMES)}")
        if name != "none":
            for key, value in (("ALPHA", alpha), ("BETA", beta)):
                if not 0 <= value <= 1:
                    raise ValueError(f"MODEL.OVSEG.ENSEMBLE.{key} is {value}; expected a number from 0 to 1")
        if trained is None and (closed or name != "none"):
            why = "a generator with a closed vocabulary" if closed else f"{_NAME} {name!r}"
            raise ValueError(f"{_DATASET}: the classes of the generator's training are not known, which {why} needs")
        self.trained, self.closed = trained, closed
        self.name, self.alpha, self.beta = name, alpha, beta

    @classmethod
    def from_config(cls, cfg: CfgNode, *, has_classes: bool) -> GeneratorClasses:
        """
        Args:
            has_classes: whether the generator classifies its masks.

        Raises:
            ValueError: see :meth:`__init__`; a dataset without classes; a generator that does not classify, in an
                ensemble; a class head of another size than the classes of its training.
        """
        prop, ensemble = cfg.MODEL.OVSEG.PROPOSALS, cfg.MODEL.OVSEG.ENSEMBLE
        trained = training_vocabulary([prop.DATASET] if prop.DATASET else cfg.DATASETS.TRAIN)
        if prop.DATASET and trained is None:
            raise ValueError(f"{_DATASET}: {prop.DATASET!r} is no registered dataset with class names")
        closed = has_classes and prop.CLASS_HEAD == "linear"
        built = cls(trained=trained, closed=closed, name=ensemble.NAME, alpha=ensemble.ALPHA, beta=ensemble.BETA)
        if built.name != "none" and not has_classes:
            raise ValueError(
                f"{_NAME} is {built.name!r}, but {prop.NAME} with PROPOSALS.CLASS_HEAD {prop.CLASS_HEAD!r} has no "
                "classes; expected 'none'"
            )
        num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        if closed and num_classes != len(trained):
            key = f"{_DATASET} {prop.DATASET}" if prop.DATASET else f"DATASETS.TRAIN {cfg.DATASETS.TRAIN[0]}"
            raise ValueError(
                f"{key} has {len(trained)} classes, but the class head of {prop.NAME} has {num_classes} "
                "(MODEL.SEM_SEG_HEAD.NUM_CLASSES); expected the dataset that the generator was trained on, and as many"
            )
        return built

    def seen(self, vocabulary: Vocabulary) -> Tensor:
        """(K,) bool, which classes have a synonym in common with one that the generator's training knew.

        The flags of a zero-shot split do not count: they are about another training.
        """
        return torch.tensor(replace(vocabulary, is_seen=()).seen_in(_learned(self.trained)), dtype=torch.bool)

    def proposal_logits(self, class_logits: Tensor | None, vocabulary: Vocabulary) -> Tensor | None:
        """A generator's logits in the test vocabulary, (N, Q, K + 1) float32, "no object" last; None from None.

        Args:
            class_logits: (N, Q, K' + 1) of a closed generator, (N, Q, K + 1) of one that follows the texts.
        """
        if class_logits is None:
            return None
        class_logits = class_logits.float()
        if not self.closed:
            return class_logits
        table = class_table(self.trained, vocabulary).to(class_logits.device)
        return translated_logits(class_logits, table, len(vocabulary))

    def probs(self, class_logits: Tensor | None, vocabulary: Vocabulary) -> tuple[Tensor | None, Tensor | None]:
        """``proposal_probs`` (N, Q, K), as if there were objects only, and ``void_probs`` (N, Q), of "no object" among
        all; None and None for a generator without classes.

        Args:
            class_logits: the generator's, see :meth:`proposal_logits`.
        """
        logits = self.proposal_logits(class_logits, vocabulary)
        if logits is None:
            return None, None
        return logits[..., :-1].softmax(-1), logits.softmax(-1)[..., -1]

    def ensembled(self, clip_logits: Tensor, proposal_probs: Tensor | None, vocabulary: Vocabulary) -> Tensor:
        """Logits (N, Q, K) of the classes. Seen: log(Ps^(1 - alpha) Pc^alpha + 1e-8), others with beta.

        Args:
            clip_logits: (N, Q, K), CLIP's, which come back as they are without an ensemble.
            proposal_probs: (N, Q, K) of :meth:`probs`.
        """
        clip_logits = clip_logits.float()
        if self.name == "none":
            return clip_logits
        assert proposal_probs is not None, "the ensemble needs a generator with classes"
        seen = self.seen(vocabulary).to(clip_logits.device)
        return floored_logits(
            geometric_ensemble(proposal_probs, clip_logits.softmax(-1), seen, alpha=self.alpha, beta=self.beta)
        )

    def combine(self, clip_logits: Tensor, proposals: MaskProposals, vocabulary: Vocabulary) -> Tensor:
        """CLIP's logits (N, Q, K) of a generator's masks and what the generator says -> (N, Q, K + 1) logarithms of
        probabilities.

        "No object" is impossible where the generator does not know it (masks of files, perfect masks), and certain for
        rows that only fill the batch.
        """
        proposal_probs, void_probs = self.probs(proposals.class_logits, vocabulary)
        if void_probs is None:
            void_probs = clip_logits.new_zeros(clip_logits.shape[:2])
        if proposals.valid is not None:
            void_probs = void_probs.masked_fill(~proposals.valid, 1.0)
        return with_void(self.ensembled(clip_logits, proposal_probs, vocabulary), void_probs)


def _learned(trained: Vocabulary | None) -> Vocabulary | None:
    """Without the classes that a zero-shot split kept from training."""
    if trained is None or not trained.is_seen:
        return trained
    kept = [i for i, is_seen in enumerate(trained.is_seen) if is_seen]
    return Vocabulary(
        names=tuple(trained.names[i] for i in kept),
        is_thing=tuple(trained.is_thing[i] for i in kept),
        synonyms=tuple(trained.synonyms[i] for i in kept),
    )
