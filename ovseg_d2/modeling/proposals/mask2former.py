"""Mask2Former as a source of mask proposals (arXiv 2112.01527)."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import Backbone, build_backbone
from torch import Tensor, nn

import ovseg_d2.modeling.backbones  # noqa: F401  (fills detectron2's registry of backbones)
from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.proposals.build import MASK_PROPOSAL_REGISTRY
from ovseg_d2.modeling.proposals.decoders import build_decoders
from ovseg_d2.modeling.proposals.mask_decoder import MaskedAttentionDecoder
from ovseg_d2.modeling.proposals.pixel_decoder import MSDeformAttnPixelDecoder
from ovseg_d2.structures import ClipFeatures, ImageBatch, MaskProposals, TextClasses


@MASK_PROPOSAL_REGISTRY.register()
class Mask2FormerProposals(nn.Module):
    """Backbone, pixel decoder and masked-attention decoder."""

    @configurable
    def __init__(
        self, *, backbone: Backbone, pixel_decoder: MSDeformAttnPixelDecoder, mask_decoder: MaskedAttentionDecoder
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.mask_decoder = mask_decoder

    @classmethod
    def from_config(cls, cfg: CfgNode, clip: Clip | None = None) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        decoders = build_decoders(cfg, backbone.output_shape(), source="the backbone", clip=clip)
        return {"backbone": backbone, **decoders}

    def forward(
        self,
        images: ImageBatch,
        features: ClipFeatures | None = None,
        text: TextClasses | None = None,
        *,
        text_queries: Tensor | None = None,
    ) -> MaskProposals:
        """
        Args:
            features: not used.
            text: embeds (E, 1, D), for a text head.
            text_queries: (E, C) texts among the queries, see :class:`MaskedAttentionDecoder`.

        Returns:
            Proposals at the pixel decoder's common stride, with class logits (N, Q, K + 1) and ``aux``.
        """
        pixels = self.pixel_decoder(self.backbone(images.tensor))
        return self.mask_decoder(pixels.multi_scale, pixels.mask_features, text, text_queries=text_queries)
