"""Mask2Former as a source of mask proposals (arXiv 2112.01527)."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import Backbone, build_backbone
from torch import nn

import ovseg_d2.modeling.backbones  # noqa: F401  (fills detectron2's registry of backbones)
from ovseg_d2.modeling.proposals.build import MASK_PROPOSAL_REGISTRY
from ovseg_d2.modeling.proposals.mask_decoder import MaskedAttentionDecoder
from ovseg_d2.modeling.proposals.pixel_decoder import MSDeformAttnPixelDecoder
from ovseg_d2.structures import ImageBatch, MaskProposals


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
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        prop = cfg.MODEL.OVSEG.PROPOSALS
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        missing = [name for name in prop.IN_FEATURES if name not in shapes]
        if missing:
            raise ValueError(
                f"MODEL.OVSEG.PROPOSALS.IN_FEATURES: {missing} are not among the backbone's outputs {sorted(shapes)}"
            )
        pixel_decoder = MSDeformAttnPixelDecoder(
            input_shape={name: shapes[name] for name in prop.IN_FEATURES},
            encoder_features=prop.ENC_FEATURES,
            dim=prop.PIXEL_DIM,
            mask_dim=prop.MASK_DIM,
            ffn_dim=prop.ENC_FFN_DIM,
            num_layers=prop.ENC_LAYERS,
            num_heads=prop.NUM_HEADS,
            dropout=prop.ENC_DROPOUT,
            norm=prop.NORM,
            common_stride=prop.COMMON_STRIDE,
        )
        mask_decoder = MaskedAttentionDecoder(
            in_dim=prop.PIXEL_DIM,
            dim=prop.HIDDEN_DIM,
            mask_dim=prop.MASK_DIM,
            num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            num_queries=prop.NUM_QUERIES,
            num_heads=prop.NUM_HEADS,
            ffn_dim=prop.DEC_FFN_DIM,
            num_layers=prop.DEC_LAYERS,
            num_scales=MSDeformAttnPixelDecoder.NUM_SCALES,
            pre_norm=prop.PRE_NORM,
            enforce_input_proj=prop.ENFORCE_INPUT_PROJ,
        )
        return {"backbone": backbone, "pixel_decoder": pixel_decoder, "mask_decoder": mask_decoder}

    def forward(self, images: ImageBatch) -> MaskProposals:
        """Proposals at the pixel decoder's common stride, with class logits (N, Q, K + 1) and ``aux``."""
        pixels = self.pixel_decoder(self.backbone(images.tensor))
        return self.mask_decoder(pixels.multi_scale, pixels.mask_features)
