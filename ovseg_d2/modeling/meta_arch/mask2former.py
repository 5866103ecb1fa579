"""Mask2Former with a closed vocabulary (arXiv 2112.01527)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ovseg_d2.modeling.losses.set_criterion import SetCriterion
from ovseg_d2.modeling.meta_arch.base import OpenVocabSegmentor
from ovseg_d2.modeling.proposals import build_mask_proposals
from ovseg_d2.structures import ImageBatch, MaskProposals, SegmentationTargets, Vocabulary


@META_ARCH_REGISTRY.register()
class Mask2Former(OpenVocabSegmentor):
    """Mask proposals classified by their generator's own linear head."""

    @configurable
    def __init__(self, *, proposals: nn.Module, criterion: SetCriterion, **shared: Any) -> None:
        """
        Args:
            proposals: images -> :class:`MaskProposals` with class logits.
            criterion: its training loss; it also tells the number of classes.
            shared: see :class:`OpenVocabSegmentor`.
        """
        super().__init__(**shared)
        self.proposals = proposals
        self.criterion = criterion

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            "proposals": build_mask_proposals(cfg),
            "criterion": SetCriterion.from_config(cfg),
            **cls.shared_from_config(cfg),
        }

    def losses(
        self, images: ImageBatch, targets: Sequence[SegmentationTargets], vocabulary: Vocabulary | None
    ) -> dict[str, Tensor]:
        return self.criterion(self.proposals(images), targets, images.image_ids)

    def predict(self, images: ImageBatch, vocabulary: Vocabulary) -> MaskProposals:
        """
        Raises:
            ValueError: ``vocabulary`` has another number of classes than the classifier.
        """
        self.check_classes(vocabulary)
        return self.proposals(images)

    def check_classes(self, vocabulary: Vocabulary) -> None:
        """Raise a ``ValueError`` if ``vocabulary`` has another number of classes than the classifier."""
        if len(vocabulary) != self.criterion.num_classes:
            raise ValueError(
                f"the vocabulary has {len(vocabulary)} classes, but Mask2Former's classifier is fixed to the "
                f"{self.criterion.num_classes} of MODEL.SEM_SEG_HEAD.NUM_CLASSES"
            )
