"""Hosts: a trained mask generator whose masks a frozen CLIP classifies, too.

ZegFormer (arXiv 2112.07910), ZSSeg (2112.14757), FreeSeg (2303.17225) and OVSeg (2210.04150) are configurations of one
model. They differ in the generator, the texts, the crops and the ensemble (MAFT, arXiv 2310.00240, appendix A).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ovseg_d2.data.templates import get_templates
from ovseg_d2.modeling.clip.architectures import tower_kind
from ovseg_d2.modeling.clip.build import clip_tokenizer
from ovseg_d2.modeling.clip.image_prompts import MaskPrompts, build_mask_prompts
from ovseg_d2.modeling.clip.prompts import SentencePrompts, build_sentence_prompts
from ovseg_d2.modeling.losses.set_criterion import SetCriterion
from ovseg_d2.modeling.losses.task_targets import TASKS, TaskSampler, targets_of_task
from ovseg_d2.modeling.mask_classification.host_ensemble import HostEnsemble, calibrated
from ovseg_d2.modeling.mask_classification.mask_encoder import MaskEncoder
from ovseg_d2.modeling.mask_classification.similarity import cosine_logits
from ovseg_d2.modeling.meta_arch.open_vocabulary import ClipSegmentor
from ovseg_d2.modeling.proposals import build_mask_proposals, has_classes
from ovseg_d2.modeling.text_classifier import TextClassifier, averaged
from ovseg_d2.structures import ImageBatch, MaskProposals, SegmentationTargets, TextClasses, Vocabulary


@META_ARCH_REGISTRY.register()
class FrozenCLIP(ClipSegmentor):
    """Training is that of the generator, against the texts of the seen classes; CLIP has its say in evaluation."""

    #: Whether ``MODEL.OVSEG.CLIP.TRAINABLE`` speaks of a copy of CLIP that the method tunes.
    tunes_a_copy = False

    @configurable
    def __init__(
        self,
        *,
        proposals: nn.Module,
        criterion: SetCriterion | None,
        mask_encoder: MaskEncoder,
        ensemble: HostEnsemble,
        region_classifier: TextClassifier | None = None,
        prompts: SentencePrompts | None = None,
        query_prompts: bool = True,
        mask_prompts: MaskPrompts | None = None,
        tasks: TaskSampler | None = None,
        calibration: float = 0.0,
        **shared: Any,
    ) -> None:
        """
        Args:
            proposals: the generator; its class head, if it has one, knows any class by its text.
            criterion: of the generator's training; None for one that is not trained.
            mask_encoder: masks -> CLIP's embeddings of them, as crops.
            ensemble: what becomes of the two classifications.
            region_classifier: texts that CLIP compares masks with; None: those of the generator's classifier.
            prompts: learned sentences around the names (ZSSeg), one a task (FreeSeg); trained before, by PromptTuning.
            query_prompts: they are in the texts of the generator's classifier, too.
            mask_prompts: for what a mask leaves out of a crop (OVSeg).
            tasks: draws the kind of targets of each iteration; None: the targets as they are.
            calibration: subtracted from the semantic scores of seen classes (ZegFormer).
            shared: see :class:`ClipSegmentor`.
        """
        super().__init__(**shared)
        self.proposals = proposals
        self.criterion = criterion
        self.mask_encoder = mask_encoder
        self.ensemble = ensemble
        self.region_classifier = region_classifier
        self.prompts, self.query_prompts = prompts, query_prompts
        self.mask_prompts = mask_prompts
        self.tasks = tasks
        self.calibration = calibration
        for trained_before in (self.clip, self.prompts, self.mask_prompts):
            if trained_before is not None:
                trained_before.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        ovseg = cfg.MODEL.OVSEG
        if ovseg.CLIP.TRAINABLE != "frozen" and not cls.tunes_a_copy:
            raise ValueError(
                f"MODEL.OVSEG.CLIP.TRAINABLE: got {ovseg.CLIP.TRAINABLE!r}; the CLIP of FrozenCLIP is 'frozen', "
                "MODEL.META_ARCHITECTURE MAFT tunes it"
            )
        shared = cls.shared_from_config(cfg, **cls.clip_options(cfg))
        proposals = build_mask_proposals(cfg, shared["clip"])
        classifies = has_classes(proposals)
        if classifies and ovseg.PROPOSALS.CLASS_HEAD == "linear":
            raise ValueError(
                "MODEL.OVSEG.PROPOSALS.CLASS_HEAD: got 'linear', which knows no unseen classes; expected 'embed', "
                "'text' or 'none'"
            )
        return {
            "proposals": proposals,
            "criterion": SetCriterion.from_config(cfg) if classifies else None,
            "mask_encoder": MaskEncoder.from_config(cfg, crops=True),
            "ensemble": HostEnsemble.from_config(cfg, has_classes=classifies),
            "region_classifier": _region_classifier(cfg, shared["text_classifier"]),
            "prompts": build_sentence_prompts(cfg, shared["clip"]),
            "query_prompts": ovseg.FROZEN_CLIP.QUERY_PROMPTS,
            "mask_prompts": build_mask_prompts(cfg, shared["clip"]),
            "tasks": TaskSampler.from_config(cfg) if classifies else None,
            "calibration": ovseg.ENSEMBLE.CALIBRATE,
            **shared,
        }

    @staticmethod
    def clip_options(cfg: CfgNode) -> dict[str, Any]:
        """What CLIP's image encoder computes: embeddings of whole pictures, nothing else."""
        return {"last_block": "none"} if tower_kind(cfg.MODEL.OVSEG.CLIP.NAME) in ("vit", "eva") else {}

    def losses(
        self, images: ImageBatch, targets: Sequence[SegmentationTargets], vocabulary: Vocabulary | None
    ) -> dict[str, Tensor]:
        """
        Raises:
            ValueError: a generator that cannot be trained.
        """
        if self.criterion is None:
            raise ValueError(
                f"a FrozenCLIP on {type(self.proposals).__name__} has nothing to train; evaluate it with --eval-only"
            )
        vocabulary = self.required(vocabulary)
        task = TASKS[0]
        if self.tasks is not None:
            task = self.tasks.draw()
            targets = targets_of_task(targets, task, vocabulary.is_thing)
        proposals = self.propose(self.proposals, images, self.query_text(vocabulary, task), vocabulary)
        return self.criterion(proposals, targets, images.image_ids)

    def infer(
        self, images: ImageBatch, batched_inputs: Sequence[dict[str, Any]], vocabulary: Vocabulary
    ) -> list[dict[str, Any]]:
        tasks = [task for task in TASKS if task in self.inference.tasks]
        if not self._has_task_prompts:
            results = super().infer(images, batched_inputs, vocabulary)
        else:  # each result comes from the texts of its task
            results = [{} for _ in batched_inputs]
            for task in tasks:
                proposals = self.predict(images, vocabulary, task)
                inference = self.inference.only(task)
                for result, part in zip(
                    results, self.results(proposals, images, batched_inputs, vocabulary, inference), strict=True
                ):
                    result.update(part)
        if self.calibration and "semantic" in tasks:
            seen = self.region_text(vocabulary).seen
            for result in results:
                result["sem_seg"] = calibrated(result["sem_seg"], seen, self.calibration)
        return results

    def predict(self, images: ImageBatch, vocabulary: Vocabulary, task: str = TASKS[0]) -> MaskProposals:
        """
        Args:
            task: whose texts are used, where tasks have prompts.
        """
        text = self.region_text(vocabulary, task)
        proposals = self.propose(self.proposals, images, self.query_text(vocabulary, task), vocabulary)
        mask_embeds, valid = self.mask_embeds(images, proposals)
        scores = self.ensemble(
            cosine_logits(mask_embeds, text, self.clip.scale()),
            text.seen,
            proposal_logits=proposals.class_logits,
            valid=valid,
            dataset_names=images.dataset_names,
        )
        # CLIP has no word for "no object"; what the generator says of it is in the scores.
        return replace(proposals, class_probs=torch.cat([scores, torch.zeros_like(scores[..., :1])], dim=-1))

    def mask_embeds(self, images: ImageBatch, proposals: MaskProposals) -> tuple[Tensor, Tensor | None]:
        """CLIP's embeddings of the masks (N, Q, D), not normalised, and which are valid (N, Q)."""
        return self.mask_encoder(self.clip.visual, images, proposals, mask_prompts=self.mask_prompts)

    def query_text(self, vocabulary: Vocabulary, task: str = TASKS[0]) -> TextClasses:
        """Embeddings (E, 1, D) for the generator's classifier."""
        return self._text(self.text_classifier, vocabulary, task, self.prompts if self.query_prompts else None)

    def region_text(self, vocabulary: Vocabulary, task: str = TASKS[0]) -> TextClasses:
        """Embeddings (E, 1, D) for CLIP's classification of masks."""
        return self._text(self.region_classifier or self.text_classifier, vocabulary, task, self.prompts)

    @property
    def _has_task_prompts(self) -> bool:
        return self.prompts is not None and len(self.prompts.task_tokens) > 1

    def _text(
        self, classifier: TextClassifier, vocabulary: Vocabulary, task: str, prompts: SentencePrompts | None
    ) -> TextClasses:
        text = classifier(self.clip.text, vocabulary, prompts=prompts)
        if prompts is not None and self._has_task_prompts:
            index = TASKS.index(task)
            return replace(text, embeds=text.embeds[:, index : index + 1])
        return averaged(text)


def _region_classifier(cfg: CfgNode, query_classifier: TextClassifier) -> TextClassifier | None:
    """With the templates of ``FROZEN_CLIP.REGION_TEMPLATES``, if there are any."""
    templates = cfg.MODEL.OVSEG.FROZEN_CLIP.REGION_TEMPLATES
    if not templates:
        return None
    return TextClassifier(
        tokenizer=clip_tokenizer(cfg.MODEL.OVSEG.CLIP.NAME),
        templates=get_templates(templates, key="MODEL.OVSEG.FROZEN_CLIP.REGION_TEMPLATES"),
        trained_vocabulary=query_classifier.trained_vocabulary,
        cache_dir=query_classifier.cache_dir,
    )
