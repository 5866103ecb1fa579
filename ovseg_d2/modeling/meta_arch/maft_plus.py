"""MAFT+ (arXiv 2408.00744): FC-CLIP whose CLIP is tuned with it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor
from torch.nn import functional as F

from ovseg_d2.modeling.clip.architectures import tower_kind
from ovseg_d2.modeling.losses.mask_aware import MaskAwareLoss
from ovseg_d2.modeling.losses.representation_compensation import representation_compensation_loss
from ovseg_d2.modeling.mask_classification.content_transfer import ContentDependentTransfer, transferred_logits
from ovseg_d2.modeling.mask_classification.ensemble import with_void
from ovseg_d2.modeling.meta_arch.fcclip import FCCLIP
from ovseg_d2.modeling.text_classifier import averaged, class_logits
from ovseg_d2.structures import (
    ClipFeatures,
    ImageBatch,
    MaskProposals,
    SegmentationTargets,
    TextClasses,
    Vocabulary,
)

#: How each kind of tower is asked for its dense features in the joint space.
_DENSE = {"convnext": {"dense": True}, "resnet": {"dense": "value"}}


@META_ARCH_REGISTRY.register()
class MAFTPlus(FCCLIP):
    """CLIP's image tower learns from two losses on its classification of masks, the generator from FC-CLIP's.

    The generator sees CLIP's features without gradient. Masks are named by CLIP alone; the generator says what is no
    object.
    """

    tunes_clip = True

    @configurable
    def __init__(
        self,
        *,
        content_transfer: ContentDependentTransfer | None,
        mask_aware_loss: MaskAwareLoss,
        mask_aware_weight: float,
        compensation_weight: float,
        compensation_scales: Sequence[int],
        **fcclip: Any,
    ) -> None:
        """
        Args:
            content_transfer: makes the class texts depend on the image; None: they do not.
            mask_aware_loss: MAFT's.
            mask_aware_weight, compensation_weight: of the losses; with 0 for the latter there is no teacher.
            compensation_scales: see :func:`representation_compensation_loss`.
            fcclip: see :class:`FCCLIP`; its ensemble is not used.
        """
        super().__init__(**fcclip)
        self.content_transfer = content_transfer
        self.mask_aware_loss = mask_aware_loss
        self.mask_aware_weight, self.compensation_weight = mask_aware_weight, compensation_weight
        self.compensation_scales = tuple(compensation_scales)
        self.teacher = deepcopy(self.clip.visual).requires_grad_(False) if compensation_weight else None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        options = cfg.MODEL.OVSEG.MAFT_PLUS
        base = super().from_config(cfg)
        return {
            "content_transfer": build_content_transfer(cfg, base["clip"].embed_dim),
            "mask_aware_loss": MaskAwareLoss(),
            "mask_aware_weight": options.MASK_AWARE_WEIGHT,
            "compensation_weight": options.RC_WEIGHT,
            "compensation_scales": _checked_scales(options.RC_SCALES),
            **base,
        }

    @staticmethod
    def clip_options(cfg: CfgNode) -> dict[str, Any]:
        """Dense features, too, for the content-dependent transfer.

        Raises:
            ValueError: a tower that is no ConvNeXt or ResNet.
        """
        name = cfg.MODEL.OVSEG.CLIP.NAME
        if tower_kind(name) not in _DENSE:
            raise ValueError(f"MODEL.OVSEG.CLIP.NAME: {name} is a transformer; MAFT+ needs a ConvNeXt or a ResNet")
        return _DENSE[tower_kind(name)] if cfg.MODEL.OVSEG.MAFT_PLUS.CONTENT_TRANSFER else {}

    def train(self, mode: bool = True) -> MAFTPlus:
        """As in PyTorch, but CLIP's image tower stays as in evaluation: what stochastic depth or the statistics of a
        batch do to its features would count as a difference from the teacher's."""
        super().train(mode)
        self.clip.visual.eval()
        return self

    def fill_missing(self, given: set[str]) -> set[str]:
        """Make the teacher a copy of the pretrained CLIP, unless a file gave it.

        Args:
            given: names of the tensors that files gave.

        Returns:
            Names of the tensors that were copied.
        """
        if self.teacher is None or any(name.startswith("teacher.") for name in given):
            return set()
        self.teacher.load_state_dict(self.clip.visual.state_dict())
        return {f"teacher.{name}" for name in self.teacher.state_dict()}

    def losses(
        self, images: ImageBatch, targets: Sequence[SegmentationTargets], vocabulary: Vocabulary | None
    ) -> dict[str, Tensor]:
        text = averaged(self.text(self.required(vocabulary)))
        features = self.clip.visual(images.tensor)
        proposals = self.proposals(images, _detached(features), text)
        losses = self.criterion(proposals, targets, images.image_ids)
        mask_logits = proposals.mask_logits.detach()
        clip_probs = self.clip_logits(features, mask_logits, text).softmax(-1)
        mask_probs = F.interpolate(
            mask_logits.float(), size=images.padded_size, mode="bilinear", align_corners=False
        ).sigmoid()
        losses["loss_mask_aware"] = self.mask_aware_weight * self.mask_aware_loss(clip_probs, mask_probs, targets)
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher(images.tensor, masks_only=True)
            # The last map before its projection, as in the public code.
            losses["loss_compensation"] = self.compensation_weight * representation_compensation_loss(
                features.layers["res5"], teacher.layers["res5"], scales=self.compensation_scales
            )
        return losses

    def predict(self, images: ImageBatch, vocabulary: Vocabulary) -> MaskProposals:
        text = averaged(self.text(vocabulary))
        features = self.clip_features(images)
        proposals = self.proposals(images, features, text)
        logits = self.clip_logits(features, proposals.mask_logits, text)
        void_probs = proposals.class_logits.float().softmax(-1)[..., -1]
        return replace(proposals, class_logits=with_void(logits, void_probs))

    def clip_logits(self, features: ClipFeatures, mask_logits: Tensor, text: TextClasses) -> Tensor:
        """CLIP's classification (N, Q, K) of masks (N, Q, h, w), by texts that know the images."""
        mask_embeds = self.clip.visual.encode_masks(features, mask_logits, from_logits=True)
        # The public code has a row of "no object" here, too; rows do not see each other, and its logit is not used.
        rows = text.embeds[:, 0].expand(len(mask_embeds), -1, -1)
        if self.content_transfer is not None:
            rows = self.content_transfer(text.embeds[:, 0], features.dense)
        return class_logits(transferred_logits(mask_embeds, rows, self.clip.scale()), text.class_ids, len(text))


def build_content_transfer(cfg: CfgNode, embed_dim: int) -> ContentDependentTransfer | None:
    """By ``MODEL.OVSEG.MAFT_PLUS``.

    Raises:
        ValueError: its heads cannot share the ``embed_dim`` channels.
    """
    options = cfg.MODEL.OVSEG.MAFT_PLUS
    if not options.CONTENT_TRANSFER:
        return None
    if options.HEADS < 1 or embed_dim % options.HEADS:
        raise ValueError(
            f"MODEL.OVSEG.MAFT_PLUS.HEADS: got {options.HEADS}; expected a divisor of CLIP's {embed_dim} dimensions"
        )
    return ContentDependentTransfer(dim=embed_dim, num_heads=options.HEADS, panoptic=options.PANOPTIC)


def _checked_scales(scales: Sequence[int]) -> Sequence[int]:
    if not scales or min(scales) < 1:
        raise ValueError(f"MODEL.OVSEG.MAFT_PLUS.RC_SCALES: got {list(scales)}; expected one or more integers from 1")
    return scales


def _detached(features: ClipFeatures) -> ClipFeatures:
    return replace(features, layers={name: layer.detach() for name, layer in features.layers.items()})
