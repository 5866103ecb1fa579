"""LDVC and ZegCLIP on the tiny ViT CLIP of the package, with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from ovseg_d2.structures import Vocabulary
from tests.helpers import numbered_vocabulary, random_input, randomise, tiny_cfg

NUM_CLASSES = 5
#: Classes of a zero-shot split; the others are unseen.
SEEN = (True, False, True, True, False)


def ldvc_cfg(name: str = "LDVC", *, tasks: Sequence[str] = ("semantic",), **options: Any) -> CfgNode:
    """``options``: keys of ``MODEL.OVSEG.LDVC``."""
    cfg = tiny_cfg(num_classes=NUM_CLASSES, tasks=tasks)
    cfg.MODEL.META_ARCHITECTURE = name
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = list(CLIP_PIXEL_MEAN), list(CLIP_PIXEL_STD)
    cfg.INPUT.FORMAT = "RGB"
    ovseg = cfg.MODEL.OVSEG
    ovseg.SIZE_DIVISIBILITY = 8
    ovseg.CLIP.NAME = "OVShapes-ViT"
    ovseg.TEXT.TEMPLATES = ["a photo of a {}.", "There is a {}."]
    ldvc = ovseg.LDVC
    ldvc.VISUAL_PROMPTS, ldvc.TEXT_PROMPTS = 3, 6
    ldvc.TAPS, ldvc.TOP_K, ldvc.HEADS, ldvc.FFN_DIM = [5, 3], 2, 4, 32
    ldvc.ATM_LAYERS, ldvc.POSITION_SIZE = 2, 48
    for key, value in options.items():
        ldvc[key] = value
    return cfg


_made: dict[str, nn.Module] = {}


def make(cfg: CfgNode) -> nn.Module:
    """With random weights; the norms scale by about one. A copy of all but the tokenizer and what is frozen: building
    takes five times as long."""
    key = repr(cfg)
    if key not in _made:
        model = randomise(build_model(cfg))
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.weight.add_(1.0)
        _made[key] = model.eval()
    model = _made[key]
    shared = [model.text_classifier.tokenizer, *(p for p in model.parameters() if not p.requires_grad)]
    return deepcopy(model, {id(part): part for part in shared})


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "weight_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def split_vocabulary() -> Vocabulary:
    return replace(numbered_vocabulary(NUM_CLASSES, 3), is_seen=SEEN)


def inputs(*sizes: tuple[int, int], num_masks: int = 3) -> list[dict[str, Any]]:
    return [
        random_input(size, num_classes=NUM_CLASSES, num_masks=num_masks, seed=i)
        for i, size in enumerate(sizes or [(40, 56), (45, 33)])
    ]
