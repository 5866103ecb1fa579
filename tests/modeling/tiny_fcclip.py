"""FC-CLIP on the tiny ResNet CLIP of the package, with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from ovseg_d2.structures import Vocabulary
from tests.helpers import random_input, randomise, tiny_cfg

COLOURS = Vocabulary(
    names=("red star", "blue ring", "grass", "brick"),
    is_thing=(True, True, False, False),
    synonyms=(("red star", "red"), ("blue ring",), ("grass",), ("brick",)),
)


def fcclip_cfg(tasks: Sequence[str] = ("semantic", "panoptic", "instance")) -> CfgNode:
    cfg = tiny_cfg(tasks=tasks)
    cfg.MODEL.META_ARCHITECTURE = "FCCLIP"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = list(CLIP_PIXEL_MEAN), list(CLIP_PIXEL_STD)
    ovseg = cfg.MODEL.OVSEG
    ovseg.CLIP.NAME, ovseg.CLIP.PRETRAINED = "OVShapes-RN", ""
    ovseg.TEXT.TEMPLATES = ["a photo of a {}.", "a {} here"]
    ovseg.PROPOSALS.NAME, ovseg.PROPOSALS.CLASS_HEAD = "FCCLIPProposals", "text"
    return cfg


def random_fcclip(cfg: CfgNode | None = None, seed: int = 0) -> nn.Module:
    """Random weights everywhere; CLIP's scale as in real ones, so that the classes differ."""
    model = randomise(build_model(cfg or fcclip_cfg()), seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.add_(1.0)
        model.clip.logit_scale.fill_(3.0)
        # Masks of both signs that cover something.
        model.proposals.mask_decoder.mask_embed.layers[-1].weight.mul_(3.0)
    return model


def inputs(
    *sizes: tuple[int, int], vocabulary: Vocabulary = COLOURS, num_masks: int = 3, **extra: Any
) -> list[dict[str, Any]]:
    """Training inputs, which evaluation takes too."""
    return [
        random_input(size, num_classes=len(vocabulary), num_masks=num_masks, seed=i)
        | {"vocabulary": vocabulary, **extra}
        for i, size in enumerate(sizes)
    ]
