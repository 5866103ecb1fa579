"""How a generator's and a frozen CLIP's opinions on a mask become one: the choices of the published hosts by name.

=================  ========================================================================================
name               scores, with the formula of :mod:`ovseg_d2.modeling.mask_classification.ensemble`
=================  ========================================================================================
none               Ac alone (MAFT's Table 2, and what its public code does)
zsseg              ZSSeg and FreeSeg: alpha = 1 - lambda, beta = lambda; lambda 0 means Ac alone
ovseg              alpha = beta = lambda
zegformer          alpha = 1/3, beta = 2/3; Ac knows "no object", and is the same for all seen classes
zegformer_all      alpha = beta = 2/3; Ac knows "no object"
zegformer_clip     Ac alone, with "no object"
maft               equation 9: alpha = 1 - lambda for seen, Ac^lambda for unseen classes
=================  ========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ovseg_d2.modeling.mask_classification.ensemble import averaged_over_seen, geometric_ensemble

NAMES = ("none", "zsseg", "ovseg", "zegformer", "zegformer_all", "zegformer_clip", "maft")
_ZEGFORMER_LAMBDA = 2 / 3


class HostEnsemble:
    """Logits of both classifiers -> scores of the classes, which need not add up to one."""

    def __init__(self, *, name: str, weight: float = 0.7, weight_of: Mapping[str, float] | None = None) -> None:
        """
        Args:
            name: see the module.
            weight: lambda.
            weight_of: other values for images of some datasets.

        Raises:
            ValueError: no such ensemble, or a weight outside [0, 1].
        """
        if name not in NAMES:
            raise ValueError(f"MODEL.OVSEG.ENSEMBLE.NAME is {name!r}; allowed are {', '.join(NAMES)}")
        self.name, self.weight, self.weight_of = name, weight, dict(weight_of or {})
        for key, value in (("LAMBDA", weight), *((f"LAMBDA_OF {k}", v) for k, v in self.weight_of.items())):
            if not 0 <= value <= 1:
                raise ValueError(f"MODEL.OVSEG.ENSEMBLE.{key} is {value}; expected a number from 0 to 1")

    @classmethod
    def from_config(cls, cfg: CfgNode, *, has_classes: bool = True) -> HostEnsemble:
        """
        Args:
            has_classes: whether the generator classifies its masks.

        Raises:
            ValueError: see :meth:`__init__`, or it does not, in an ensemble that needs it.
        """
        ensemble = cfg.MODEL.OVSEG.ENSEMBLE
        try:
            weight_of = {str(name): float(value) for name, value in ensemble.LAMBDA_OF}
        except (TypeError, ValueError):
            raise ValueError(
                f"MODEL.OVSEG.ENSEMBLE.LAMBDA_OF is {ensemble.LAMBDA_OF}; expected [[dataset, number], ...]"
            ) from None
        built = cls(name=ensemble.NAME, weight=ensemble.LAMBDA, weight_of=weight_of)
        built.check_generator(has_classes=has_classes)
        return built

    def check_generator(self, *, has_classes: bool) -> None:
        """
        Raises:
            ValueError: the generator does not classify its masks, which the ensemble needs.
        """
        if self.name != "none" and not has_classes:
            raise ValueError(
                f"MODEL.OVSEG.ENSEMBLE.NAME is {self.name!r}, but the mask generator has no classes; expected 'none', "
                "or MODEL.OVSEG.PROPOSALS.CLASS_HEAD 'embed'"
            )

    def __call__(
        self,
        clip_logits: Tensor,
        seen: Tensor,
        *,
        proposal_logits: Tensor | None = None,
        valid: Tensor | None = None,
        dataset_names: Sequence[str | None] = (),
    ) -> Tensor:
        """
        Args:
            clip_logits: (N, Q, K).
            seen: (K,) bool.
            proposal_logits: (N, Q, K + 1), "no object" last.
            valid: (N, Q) bool, False for masks that CLIP has not seen: the generator alone judges those, or, where
                CLIP decides alone, nobody does.
            dataset_names: of the N images, for their weights.

        Returns:
            (N, Q, K).

        Raises:
            ValueError: a generator without classes, in an ensemble that needs them.
        """
        clip_logits = clip_logits.float()
        if self.name == "none":
            return _dropped(clip_logits.softmax(-1), valid)
        self.check_generator(has_classes=proposal_logits is not None)
        proposal_logits = proposal_logits.float()
        proposal_probs = proposal_logits.softmax(-1)[..., :-1]
        if self.name.startswith("zegformer"):
            clip_probs = torch.cat([clip_logits, proposal_logits[..., -1:]], dim=-1).softmax(-1)[..., :-1]
            return self._zegformer(_dropped(clip_probs, valid), proposal_probs, seen)

        names = dataset_names or [None] * len(clip_logits)
        weights = [self.weight_of.get(name or "", self.weight) for name in names]
        weight = clip_logits.new_tensor(weights).view(-1, 1, 1)
        clip_probs = clip_logits.softmax(-1)
        if valid is not None:
            # Where CLIP decides alone (a weight of 0) an empty mask says nothing; else the generator decides alone.
            clip_probs = clip_probs.masked_fill(~valid[..., None], 1.0) * (valid[..., None] | (weight != 0))
        alpha = weight if self.name == "ovseg" else 1 - weight
        alpha, beta = (torch.where(weight == 0, 1.0, part) for part in (alpha, weight))
        scores = geometric_ensemble(proposal_probs, clip_probs, seen, alpha=alpha, beta=beta)
        if self.name != "maft":
            return scores
        by_clip = geometric_ensemble(
            proposal_probs, clip_probs, seen, alpha=alpha, beta=beta, unseen_by_clip_alone=True
        )
        # An empty mask, which CLIP says nothing of, would be certain to be of every unseen class.
        return by_clip if valid is None else torch.where(valid[..., None], by_clip, scores)

    def _zegformer(self, clip_probs: Tensor, proposal_probs: Tensor, seen: Tensor) -> Tensor:
        if self.name == "zegformer_clip":
            return clip_probs
        alpha = _ZEGFORMER_LAMBDA
        if self.name == "zegformer":
            alpha, clip_probs = 1 - _ZEGFORMER_LAMBDA, averaged_over_seen(clip_probs, seen)
        return geometric_ensemble(proposal_probs, clip_probs, seen, alpha=alpha, beta=_ZEGFORMER_LAMBDA)


def calibrated(sem_seg: Tensor, seen: Tensor, amount: float) -> Tensor:
    """Scores (K, H, W) with those of the seen (K,) classes lowered (ZegFormer's, against the bias towards them)."""
    return sem_seg - amount * seen[:, None, None].to(sem_seg)


def _dropped(probs: Tensor, valid: Tensor | None) -> Tensor:
    """Zeros for masks that are not valid."""
    return probs if valid is None else probs * valid[..., None]
