"""MAFT (arXiv 2310.00240): the CLIP of a host is tuned until its scores of masks follow their quality."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.logger import log_every_n_seconds
from torch import Tensor

from ovseg_d2.modeling.clip.architectures import tower_kind
from ovseg_d2.modeling.clip.build import build_clip
from ovseg_d2.modeling.clip.image_encoder import ClipImageEncoder
from ovseg_d2.modeling.clip.trainable import apply_policy
from ovseg_d2.modeling.losses.mask_aware import MaskAwareLoss, distill_loss
from ovseg_d2.modeling.mask_classification.mask_encoder import MaskEncoder, divisor_of
from ovseg_d2.modeling.mask_classification.similarity import cosine_logits
from ovseg_d2.modeling.meta_arch.frozen_clip import FrozenCLIP
from ovseg_d2.structures import ImageBatch, MaskProposals, SegmentationTargets, Vocabulary

#: How the table of positions is resized for 480 pixels, in the public code.
_POSITIONS = {"pos_mode": "bicubic", "pos_align_corners": True}


@META_ARCH_REGISTRY.register()
class MAFT(FrozenCLIP):
    """A host whose crops give way to IP-CLIP: one pass over the image, a class token a mask (section 4.1).

    Only IP-CLIP trains (section 4.2); generator, texts and the CLIP that it came from, its teacher, are frozen.
    """

    tunes_a_copy = True

    @configurable
    def __init__(
        self,
        *,
        ip_clip: ClipImageEncoder,
        mask_aware_loss: MaskAwareLoss,
        mask_aware_weight: float,
        distill_weight: float,
        **host: Any,
    ) -> None:
        """
        Args:
            ip_clip: CLIP's image encoder with mask tokens.
            mask_aware_loss: L_ma, equation 6.
            mask_aware_weight, distill_weight: of L_ma and L_dis; lambda in the paper.
            host: see :class:`FrozenCLIP`.
        """
        super().__init__(**host)
        self.ip_clip = ip_clip
        self.mask_aware_loss = mask_aware_loss
        self.mask_aware_weight, self.distill_weight = mask_aware_weight, distill_weight
        self.proposals.requires_grad_(False)
        self.num_images_without_targets = 0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        maft = cfg.MODEL.OVSEG.MAFT
        ip_clip = build_ip_clip(cfg)  # first, as it knows which towers there can be
        return {
            **super().from_config(cfg),
            "mask_encoder": MaskEncoder.from_config(cfg, crops=False),
            "ip_clip": ip_clip,
            "mask_aware_loss": MaskAwareLoss(kind=maft.LOSS),
            "mask_aware_weight": maft.MASK_AWARE_WEIGHT,
            "distill_weight": maft.DISTILL_WEIGHT,
        }

    @staticmethod
    def clip_options(cfg: CfgNode) -> dict[str, Any]:
        """The teacher's positions are resized as IP-CLIP's are."""
        return {**FrozenCLIP.clip_options(cfg), **_POSITIONS}

    def fill_missing(self, given: set[str]) -> set[str]:
        """Start IP-CLIP as a copy of the pretrained CLIP, unless a file gave (some of) it.

        Args:
            given: names of the tensors that files gave.

        Returns:
            Names of the tensors that were copied.
        """
        if any(name.startswith("ip_clip.") for name in given):
            return set()
        self.ip_clip.tower.load_state_dict(self.clip.visual.tower.state_dict())
        return {f"ip_clip.tower.{name}" for name in self.ip_clip.tower.state_dict()}

    def losses(
        self, images: ImageBatch, targets: Sequence[SegmentationTargets], vocabulary: Vocabulary | None
    ) -> dict[str, Tensor]:
        """L_ma and L_dis. Images without targets are left out of L_ma and counted."""
        vocabulary = self.required(vocabulary)
        text = self.region_text(vocabulary)
        copy = self.mask_encoder.clip_copy(images, divisor=divisor_of(self.ip_clip))
        with torch.no_grad():
            proposals = self.propose(self.proposals, images, self.query_text(vocabulary), vocabulary)
            mask_probs = self.mask_encoder.resized(proposals.mask_logits, images).sigmoid()
        features = self.ip_clip(copy.tensor, masks_only=not self.distill_weight)
        mask_embeds = self.ip_clip.encode_masks(features, self.mask_encoder.to_frame(mask_probs, images, copy))
        clip_probs = cosine_logits(mask_embeds, text, self.clip.scale()).softmax(-1)
        self._count(targets)
        losses = {
            "loss_mask_aware": self.mask_aware_weight
            * self.mask_aware_loss(clip_probs, mask_probs, targets, proposals.valid)
        }
        if self.distill_weight:
            with torch.no_grad():
                teacher = cosine_logits(self.clip.visual(copy.tensor).image_embeds, text, self.clip.scale())
            student = cosine_logits(features.image_embeds, text, self.clip.scale())
            losses["loss_distill"] = self.distill_weight * distill_loss(student, teacher)
        return losses

    def mask_embeds(self, images: ImageBatch, proposals: MaskProposals) -> tuple[Tensor, Tensor | None]:
        return self.mask_encoder(self.ip_clip, images, proposals)

    def _count(self, targets: Sequence[SegmentationTargets]) -> None:
        """Report, once a minute, how many images had no ground truth so far."""
        missing = sum(not len(target) for target in targets)
        self.num_images_without_targets += missing
        if missing:
            log_every_n_seconds(
                logging.WARNING,
                f"{self.num_images_without_targets} times an image without ground truth was left out of the mask-aware "
                "loss",
                n=60,
                name=__name__,
            )


def build_ip_clip(cfg: CfgNode) -> ClipImageEncoder:
    """CLIP's image encoder with class tokens for masks, trainable as ``MODEL.OVSEG.CLIP.TRAINABLE`` says.

    Raises:
        ValueError: a tower that has no attention to mask.
    """
    options = cfg.MODEL.OVSEG.CLIP
    kind = tower_kind(options.NAME)
    if kind == "convnext":
        raise ValueError(
            f"MODEL.OVSEG.CLIP.NAME: {options.NAME} pools without attention, which masks could direct; MAFT needs a "
            "ViT, or a ResNet with an attention pool"
        )
    masks: dict[str, Any] = {"mask_pooling": "maft"}
    if kind != "resnet":
        masks = {"mask_mode": "maft", "start_layer": cfg.MODEL.OVSEG.MAFT.START_LAYER, "last_block": "none"}
    visual_kwargs = {"use_checkpoint": options.USE_CHECKPOINT, **_POSITIONS, **masks}
    ip_clip = build_clip(options.NAME, visual_kwargs=visual_kwargs, with_text=False).visual
    apply_policy(ip_clip, options.TRAINABLE)
    return ip_clip
