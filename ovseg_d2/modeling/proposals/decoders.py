"""Pixel decoder and mask decoder from a configuration, on whatever features."""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import nn

from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.proposals.class_heads import build_class_head
from ovseg_d2.modeling.proposals.mask_decoder import MaskedAttentionDecoder
from ovseg_d2.modeling.proposals.pixel_decoder import MSDeformAttnPixelDecoder


def input_features(cfg: CfgNode, shapes: Mapping[str, ShapeSpec], *, source: str) -> dict[str, ShapeSpec]:
    """The features of ``MODEL.OVSEG.PROPOSALS.IN_FEATURES``.

    Args:
        shapes: of the features there are.
        source: what gives them, for errors.

    Raises:
        ValueError: one is not there.
    """
    names = cfg.MODEL.OVSEG.PROPOSALS.IN_FEATURES
    missing = [name for name in names if name not in shapes]
    if missing:
        raise ValueError(
            f"MODEL.OVSEG.PROPOSALS.IN_FEATURES: {missing} are not among the outputs of {source}: {sorted(shapes)}"
        )
    return {name: shapes[name] for name in names}


def build_decoders(
    cfg: CfgNode, shapes: Mapping[str, ShapeSpec], *, source: str, clip: Clip | None
) -> dict[str, nn.Module]:
    """``pixel_decoder`` and ``mask_decoder`` of ``MODEL.OVSEG.PROPOSALS``.

    Args:
        shapes: of the features there are.
        source: what gives them, for errors.
        clip: for a class head that needs it.

    Raises:
        ValueError: a feature that is not there, or a class head that cannot be.
    """
    prop = cfg.MODEL.OVSEG.PROPOSALS
    pixel_decoder = MSDeformAttnPixelDecoder(
        input_shape=input_features(cfg, shapes, source=source),
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
        class_head=build_class_head(cfg, clip),
        num_queries=prop.NUM_QUERIES,
        num_heads=prop.NUM_HEADS,
        ffn_dim=prop.DEC_FFN_DIM,
        num_layers=prop.DEC_LAYERS,
        num_scales=MSDeformAttnPixelDecoder.NUM_SCALES,
        pre_norm=prop.PRE_NORM,
        enforce_input_proj=prop.ENFORCE_INPUT_PROJ,
        separate_texts=cfg.MODEL.OVSEG.MTA_CLIP.SEPARATE_ATTENTION,
    )
    return {"pixel_decoder": pixel_decoder, "mask_decoder": mask_decoder}
