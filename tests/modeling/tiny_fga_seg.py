"""FGA-seg and CAT-Seg on the tiny ViT CLIP of the package, with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from tests.helpers import random_input, randomise, tiny_cfg

NUM_CLASSES = 5


def fga_cfg(name: str = "FGASeg", *, tasks: Sequence[str] = ("semantic",), **options: Any) -> CfgNode:
    """``options``: keys of ``MODEL.OVSEG.FGA_SEG``."""
    cfg = tiny_cfg(num_classes=NUM_CLASSES, tasks=tasks)
    cfg.MODEL.META_ARCHITECTURE = name
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = list(CLIP_PIXEL_MEAN), list(CLIP_PIXEL_STD)
    cfg.INPUT.FORMAT = "RGB"
    ovseg = cfg.MODEL.OVSEG
    ovseg.CLIP.NAME = "OVShapes-ViT"
    ovseg.CLIP.RESIZE, ovseg.CLIP.INPUT_SIZE = "padded_square", 48
    ovseg.CLIP.TRAINABLE = ovseg.TEXT.TRAINABLE = "attention_qv"
    ovseg.TEXT.TEMPLATES = ["A photo of a {} in the scene"]
    fga = ovseg.FGA_SEG
    fga.GUIDANCE_LAYERS = [2, 5]
    fga.HIDDEN_DIM, fga.WINDOW_SIZE, fga.MAX_CLASSES, fga.PAD_CLASSES = 32, 4, 8, 8
    fga.GUIDANCE_DIM = fga.TEXT_GUIDANCE_DIM = 16
    fga.DECODER_DIMS, fga.DECODER_GUIDANCE_DIMS, fga.DECODER_GUIDANCE_PROJ_DIMS = [16, 16], [12, 10], [8, 8]
    for key, value in options.items():
        fga[key] = value
    return cfg


def make(cfg: CfgNode) -> nn.Module:
    model = randomise(build_model(cfg))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
                module.weight.add_(1.0)
    return model.eval()


def inputs(*sizes: tuple[int, int], num_masks: int = 3) -> list[dict[str, Any]]:
    return [
        random_input(size, num_classes=NUM_CLASSES, num_masks=num_masks, seed=i)
        for i, size in enumerate(sizes or [(64, 96), (50, 41)])
    ]
