"""Learned position tables on a grid other than the one that they were trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

MODES = ("bicubic", "bilinear")


def resize_position_embedding(
    pos: Tensor, size: tuple[int, int], *, mode: str, align_corners: bool, num_prefix: int = 1
) -> Tensor:
    """Interpolate the table of a square grid; the same values when the sizes agree.

    The public models differ in how they do it, and their weights in what they expect. With aligned corners, bicubic:
    MAFT, MaskCLIP++; without, bicubic: ZSSeg, FGA-seg; without, bilinear: FC-CLIP's ResNet, ZegCLIP, DenseCLIP.

    Args:
        pos: (num_prefix + g * g, C), or the same with a leading 1.
        size: (h, w) of the new grid.
        mode: "bicubic" or "bilinear".
        align_corners: as in ``torch.nn.functional.interpolate``.
        num_prefix: rows before the grid (the class token's), which stay as they are.

    Returns:
        (num_prefix + h * w, C), with a leading 1 if ``pos`` had one.

    Raises:
        ValueError: an unknown mode, or rows that make no square grid.
    """
    if mode not in MODES:
        raise ValueError(f"resize_position_embedding: mode is {mode!r}; expected one of {', '.join(MODES)}")
    rows = pos.shape[-2] - num_prefix
    side = math.isqrt(max(rows, 0))
    if rows <= 0 or side * side != rows:
        raise ValueError(
            f"resize_position_embedding: {pos.shape[-2]} rows, of them {num_prefix} before the grid; the other {rows} "
            "make no square grid"
        )
    if (side, side) == tuple(size):
        return pos
    prefix, grid = pos[..., :num_prefix, :], pos[..., num_prefix:, :]
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    # Half precision has no bicubic kernel everywhere, and a table costs little.
    resized = F.interpolate(grid.float(), size=size, mode=mode, align_corners=align_corners).to(pos.dtype)
    resized = resized.flatten(2).transpose(1, 2).reshape(*pos.shape[:-2], -1, pos.shape[-1])
    return torch.cat([prefix, resized], dim=-2)
