"""Sine position encoding of feature maps (DETR, arXiv 2005.12872, appendix A.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SinePositionEncoding(nn.Module):
    """Sines and cosines of normalised row and column counts, interleaved; the first half of the channels is y."""

    def __init__(self, *, dim: int, temperature: float = 10000.0, scale: float = 2 * math.pi) -> None:
        """``dim``: output channels, a multiple of 4."""
        super().__init__()
        if dim % 4:
            raise ValueError(f"SinePositionEncoding: dim {dim} is not a multiple of 4")
        self.dim, self.temperature, self.scale = dim, temperature, scale

    def forward(self, feature: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            feature: (N, C, h, w), of which only size and device are used.
            padding_mask: (N, h, w) bool, True where padded; such pixels are not counted.

        Returns:
            (N, dim, h, w) float32; without a mask (1, dim, h, w), the same for every image.
        """
        h, w = feature.shape[-2:]
        device = feature.device
        if padding_mask is None:
            y = torch.arange(1, h + 1, device=device, dtype=torch.float32).view(1, h, 1).expand(1, h, w)
            x = torch.arange(1, w + 1, device=device, dtype=torch.float32).view(1, 1, w).expand(1, h, w)
        else:
            real = (~padding_mask).to(torch.float32)
            y, x = real.cumsum(1), real.cumsum(2)
        y = y / (y[:, -1:, :] + 1e-6) * self.scale
        x = x / (x[:, :, -1:] + 1e-6) * self.scale
        half = self.dim // 2
        exponents = torch.arange(0, half, 2, device=device, dtype=torch.float32) / half
        frequencies = self.temperature**-exponents
        axes = []
        for axis in (y, x):
            phase = axis[..., None] * frequencies
            axes.append(torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(-2))
        return torch.cat(axes, dim=-1).permute(0, 3, 1, 2)
