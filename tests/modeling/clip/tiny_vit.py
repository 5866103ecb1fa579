"""Tiny towers with random weights, as open_clip and timm build them."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import randomise

PATCH, DIM, WIDTH, LAYERS, HEADS = 8, 12, 32, 4, 2


def vit_tower(image_size: int | tuple[int, int] = 32, *, seed: int = 0, **options: Any) -> VisionTransformer:
    sizes = {"patch_size": PATCH, "width": WIDTH, "layers": LAYERS, "heads": HEADS, "mlp_ratio": 2.0}
    return randomise(VisionTransformer(image_size=image_size, output_dim=DIM, **{**sizes, **options}), seed).eval()


def eva_tower(image_size: int | tuple[int, int] = 32, *, seed: int = 0, rope: bool = True, **options: Any) -> TimmModel:
    """EVA-02 with rotary positions, or EVA-01 with packed projections."""
    kind = {
        "global_pool": "token",
        "qkv_fused": not rope,
        "swiglu_mlp": rope,
        "scale_mlp": rope,
        "scale_attn_inner": rope,
        "use_rot_pos_emb": rope,
        "ref_feat_shape": (3, 3) if rope else None,
    }
    tower = TimmModel.__new__(TimmModel)  # its constructor knows timm's named models only
    nn.Module.__init__(tower)
    tower.trunk = Eva(
        img_size=image_size,
        patch_size=PATCH,
        num_classes=DIM,
        embed_dim=WIDTH,
        depth=LAYERS,
        num_heads=HEADS,
        mlp_ratio=2.0,
        **{**kind, **options},
    )
    tower.head = nn.Sequential()
    return randomise(tower, seed).eval()


def resized_by_hand(pos: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """A position table (1 + side * side, C) on another grid, bicubic with aligned corners."""
    grid = pos[1:].T.reshape(1, -1, side, side)
    grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=True)
    return torch.cat([pos[:1], grid[0].flatten(1).T])


def random_images(height: int, width: int, *, count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def random_masks(count: int, size: tuple[int, int] = (24, 40), *, images: int = 2, seed: int = 2) -> Tensor:
    """Soft masks of random rectangles (images, count, *size), the last one empty."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(images, count, *size)
    for mask in masks.flatten(0, 1):
        top, left = (int(torch.randint(0, n // 2, (), generator=generator)) for n in size)
        mask[top : top + size[0] // 2, left : left + size[1] // 2] = 0.6 + 0.4 * torch.rand((), generator=generator)
    masks[:, -1] = 0
    return masks
