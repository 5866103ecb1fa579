"""MaskCLIP++ on the tiny CLIPs of the package, or on a ConvNeXt as small, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from tests.modeling.tiny_hosts import host_cfg, random_host

#: The policy that the paper has for each kind of tower.
POLICIES = {"OVShapes-ViT": "attention_in", "OVShapes-RN": "full"}


def maskclippp_cfg(clip: str = "OVShapes-ViT", generator: str = "PrecomputedProposals", **options: Any) -> CfgNode:
    """MaskCLIPpp with ``MODEL.OVSEG.MASKCLIPPP`` options; of the CLIP's size there is none but the image's."""
    cfg = host_cfg("PrecomputedProposals")
    cfg.MODEL.META_ARCHITECTURE = "MaskCLIPpp"
    ovseg = cfg.MODEL.OVSEG
    ovseg.PROPOSALS.NAME = generator
    ovseg.CLIP.NAME, ovseg.CLIP.TRAINABLE = clip, POLICIES.get(clip, "full")
    ovseg.MASKCLIPPP.WIDTH = 5
    for key, value in options.items():
        ovseg.MASKCLIPPP[key] = value
    return cfg


def convnext_json(folder: Path) -> str:
    """The path of a configuration of timm's smallest ConvNeXt, with the tokenizer of the tiny CLIPs."""
    text = {"context_length": 77, "vocab_size": 0, "width": 32, "heads": 2, "layers": 1}
    vision = {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
    path = folder / "tiny_convnext.json"
    path.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    return str(path)


def random_maskclippp(cfg: CfgNode | None = None, *, seed: int = 0) -> nn.Module:
    """Random weights everywhere; alpha not so small that its gradient vanishes."""
    model = random_host(cfg or maskclippp_cfg(), seed=seed)
    scale = getattr(model.clip.visual, "mask_logit_scale", None)
    if isinstance(scale, nn.Parameter):
        with torch.no_grad():
            scale.mul_(0.1)
    return model
