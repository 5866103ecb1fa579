"""MaskFormer as a source of mask proposals (arXiv 2107.06278), the generator of ZegFormer, ZSSeg and OVSeg."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import Backbone, build_backbone
from torch import nn

import ovseg_d2.modeling.backbones  # noqa: F401  (fills detectron2's registry of backbones)
from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.proposals.build import MASK_PROPOSAL_REGISTRY
from ovseg_d2.modeling.proposals.class_heads import build_class_head
from ovseg_d2.modeling.proposals.decoders import input_features
from ovseg_d2.modeling.proposals.fpn_pixel_decoder import FPNPixelDecoder
from ovseg_d2.modeling.proposals.transformer_decoder import TransformerMaskDecoder
from ovseg_d2.structures import ClipFeatures, ImageBatch, MaskProposals, TextClasses


@MASK_PROPOSAL_REGISTRY.register()
class MaskFormerProposals(nn.Module):
    """Backbone, FPN, and a transformer decoder whose queries look at the backbone's coarsest feature."""

    @configurable
    def __init__(
        self, *, backbone: Backbone, pixel_decoder: FPNPixelDecoder, mask_decoder: TransformerMaskDecoder
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.mask_decoder = mask_decoder

    @classmethod
    def from_config(cls, cfg: CfgNode, clip: Clip | None = None) -> dict[str, Any]:
        prop = cfg.MODEL.OVSEG.PROPOSALS
        if prop.DEC_LAYERS < 1:
            raise ValueError(
                f"MODEL.OVSEG.PROPOSALS.DEC_LAYERS: got {prop.DEC_LAYERS}; MaskFormerProposals needs at least 1"
            )
        backbone = build_backbone(cfg)
        shapes = input_features(cfg, backbone.output_shape(), source="the backbone")
        pixel_decoder = FPNPixelDecoder(input_shape=shapes, dim=prop.PIXEL_DIM, mask_dim=prop.MASK_DIM, norm=prop.NORM)
        mask_decoder = TransformerMaskDecoder(
            in_dim=shapes[pixel_decoder.features[-1]].channels,
            dim=prop.HIDDEN_DIM,
            mask_dim=prop.MASK_DIM,
            class_head=build_class_head(cfg, clip),
            num_queries=prop.NUM_QUERIES,
            num_heads=prop.NUM_HEADS,
            ffn_dim=prop.DEC_FFN_DIM,
            num_layers=prop.DEC_LAYERS,
            dropout=prop.DEC_DROPOUT,
            pre_norm=prop.PRE_NORM,
            enforce_input_proj=prop.ENFORCE_INPUT_PROJ,
        )
        return {"backbone": backbone, "pixel_decoder": pixel_decoder, "mask_decoder": mask_decoder}

    def forward(
        self, images: ImageBatch, features: ClipFeatures | None = None, text: TextClasses | None = None
    ) -> MaskProposals:
        """
        Args:
            features: not used.
            text: embeds (E, 1, D), for a class head that needs them.

        Returns:
            Proposals at the stride of the finest feature, with class logits (N, Q, K + 1) and ``aux``.
        """
        maps = self.backbone(images.tensor)
        pixels = self.pixel_decoder(maps)
        return self.mask_decoder(maps[self.pixel_decoder.features[-1]], pixels.mask_features, text)
