"""Models with random weights, and proposals that no model made."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

import ovseg_d2.modeling  # noqa: F401  (registers the models)
from ovseg_d2.engine.load_config import load_config
from ovseg_d2.structures import MaskProposals

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def random_model(config: str, device: torch.device, *opts: str) -> tuple[nn.Module, CfgNode]:
    """The model of a file in ``configs``, without its dataset; ``opts`` are further keys and values."""
    torch.manual_seed(0)
    cfg = load_config(CONFIGS / config, ["MODEL.DEVICE", str(device), "DATASETS.TRAIN", "()", *opts])
    return build_model(cfg), cfg


def random_proposals(count: int, *, stride: int, device: torch.device, side: int = 480) -> MaskProposals:
    """Rectangles of a sixteenth to three quarters of a square image, as logits on a map of a ``stride``."""
    size = side // stride
    sides = (torch.empty(count, 2).uniform_(0.25, 0.87) * size).long()
    starts = (torch.rand(count, 2) * (size - sides)).long()
    places = torch.arange(size)
    rows, columns = ((places >= starts[:, i, None]) & (places < (starts + sides)[:, i, None]) for i in (0, 1))
    masks = rows[:, :, None] & columns[:, None]
    return MaskProposals(mask_logits=torch.where(masks, 5.0, -5.0)[None].to(device))
