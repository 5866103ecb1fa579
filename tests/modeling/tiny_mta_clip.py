"""MTA-CLIP on the tiny ResNet CLIP of the package, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from tests.helpers import randomise, tiny_cfg
from tests.modeling.tiny_fcclip import COLOURS


def mta_cfg(*, num_classes: int = len(COLOURS), **options: Any) -> CfgNode:
    """``options``: values of ``MODEL.OVSEG.MTA_CLIP``."""
    cfg = tiny_cfg(num_classes)
    cfg.MODEL.META_ARCHITECTURE = "MTACLIP"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = list(CLIP_PIXEL_MEAN), list(CLIP_PIXEL_STD)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.CLIP_RESNET.NORM = "ClipResNetBackbone", "BN"
    ovseg = cfg.MODEL.OVSEG
    ovseg.CLIP.NAME, ovseg.CLIP.PRETRAINED, ovseg.CLIP.TRAINABLE = "OVShapes-RN", "", "full"
    ovseg.TEXT.TEMPLATES = ["a photo of a {}.", "a {} here"]
    ovseg.MTA_CLIP.NUM_CONTEXTS = 2
    ovseg.MTA_CLIP.CONTEXT_LENGTH, ovseg.MTA_CLIP.TEXT_LENGTH = 3, 8
    for key, value in options.items():
        assert key in ovseg.MTA_CLIP, key
        ovseg.MTA_CLIP[key] = value
    return cfg


def random_mta(cfg: CfgNode | None = None, seed: int = 0) -> nn.Module:
    """Random weights everywhere; masks of both signs that cover something, and texts that differ."""
    model = randomise(build_model(cfg or mta_cfg()), seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.add_(1.0)
        model.proposals.mask_decoder.mask_embed.layers[-1].weight.mul_(3.0)
        if model.text_queries is not None:
            model.clip.text.token_embedding.weight.mul_(10.0)
            model.text_queries.mlp.layers[-1].weight.mul_(10.0)
    return model
