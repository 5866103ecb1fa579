"""Configurations of Mask2Former on tiny backbones of each kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from transformers import SegformerConfig

from tests.helpers import tiny_cfg

KINDS = ("ClipResNetBackbone", "ClipViTFPN", "TimmViTFPN", "MixTransformer")


def backbone_cfg(kind: str, folder: Path, *, tasks: Sequence[str] = ("semantic",)) -> CfgNode:
    """Files of the architectures go to ``folder``; plain BatchNorm, no stochastic depth, everything trains."""
    cfg = tiny_cfg(tasks=tasks)
    cfg.MODEL.BACKBONE.NAME = kind
    clip = cfg.MODEL.OVSEG.CLIP
    clip.TRAINABLE, clip.PRETRAINED = "full", ""
    clip.NAME = write_clip(folder, {"layers": [1, 1, 2, 1], "width": 8, "image_size": 32, "patch_size": None})
    cfg.MODEL.CLIP_RESNET.NORM = cfg.MODEL.CLIP_VIT_FPN.NORM = cfg.MODEL.TIMM_VIT_FPN.NORM = "BN"
    cfg.MODEL.CLIP_VIT_FPN.DROP_PATH_RATE = cfg.MODEL.TIMM_VIT_FPN.DROP_PATH_RATE = cfg.MODEL.MIT.DROP_PATH_RATE = 0.0
    if kind == "ClipViTFPN":
        clip.NAME = write_clip(folder, {"image_size": 48, "layers": 4, "width": 32, "head_width": 16, "patch_size": 16})
        cfg.MODEL.CLIP_VIT_FPN.OUT_BLOCKS = [0, 1, 2, 3]
    elif kind == "TimmViTFPN":
        cfg.MODEL.TIMM_VIT_FPN.NAME, cfg.MODEL.TIMM_VIT_FPN.PRETRAINED = "test_vit", ""
        cfg.MODEL.TIMM_VIT_FPN.OUT_BLOCKS = [1, 2, 4, 5]
    elif kind == "MixTransformer":
        cfg.MODEL.MIT.NAME = write_mit(folder)
    return cfg


def write_clip(folder: Path, vision: dict) -> str:
    """The path of a CLIP's configuration."""
    text = {"context_length": 9, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1}
    path = folder / "clip.json"
    path.write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    return str(path)


def write_mit(folder: Path) -> str:
    """The folder of a Mix Transformer's configuration, without weights."""
    config = SegformerConfig(hidden_sizes=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_attention_heads=(1, 2, 3, 4))
    config.save_pretrained(folder / "mit")
    return str(folder / "mit")
