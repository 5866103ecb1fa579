"""Small CLIPs with ResNet and ConvNeXt towers, and random weights in all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from tests.helpers import randomise

TEXT = {"context_length": 12, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1}
RESNET = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "head_width": 64, "patch_size": None},
    "text_cfg": TEXT,
}


def convnext_config(proj: str = "mlp") -> dict[str, Any]:
    vision = {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": proj, "image_size": 64}
    return {"embed_dim": 12, "vision_cfg": vision, "text_cfg": TEXT}


def write_config(folder: Path, config: dict[str, Any]) -> str:
    """The path of a JSON file with ``config``, which serves as a model's name."""
    path = folder / "tiny.json"
    path.write_text(json.dumps(config))
    return str(path)


def random_open_clip(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """open_clip's own model, in evaluation mode, its moving statistics random, too."""
    model = randomise(open_clip.CLIP(**config), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.3 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
            module.weight.data.add_(1.0)
    return model


def images(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))
