"""What tells the outputs of one model from those of another, for files that several runs write together."""

from __future__ import annotations

import hashlib

import torch
from detectron2.config import CfgNode
from torch import nn


def model_fingerprint(cfg: CfgNode, model: nn.Module) -> str:
    """A hash of what a model's outputs depend on: its part of the config, the test sizes and all weights."""
    cfg = cfg.clone()
    cfg.defrost()
    # Where the same weights lie, and where they run, changes nothing.
    cfg.MODEL.WEIGHTS = cfg.MODEL.OVSEG.PROPOSALS.WEIGHTS = cfg.MODEL.OVSEG.PROPOSALS.SAM.NAME = cfg.MODEL.DEVICE = ""
    sizes = [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT]
    found = hashlib.sha256(f"{cfg.MODEL.dump()}{sizes}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
