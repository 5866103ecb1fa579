"""Losses on sampled points instead of whole masks (PointRend, arXiv 1912.08193, section 3.1; Mask2Former, section 3.3).

All randomness of the losses comes from a :class:`PointSampler`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ovseg_d2.modeling.layers.step_counter import StepCounter


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (N, C, h, w) at points (N, P, 2), x and y in [0, 1], zeros outside -> (N, C, P)."""
    grid = 2.0 * points[:, :, None] - 1.0
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(-1)


class UniformDraws(Protocol):
    """Uniform random points of one training step."""

    def __call__(self, counts: Sequence[int], num_points: int) -> Tensor:
        """(sum(counts), num_points, 2) in [0, 1): ``counts[i]`` rows for image i, in the images' order."""
        ...


class PointSampler:
    """Draws keyed by (seed, iteration, image id), so that the same images give the same points in any batch split.

    Two processes therefore train exactly as one does, and a resumed run as an uninterrupted one. Generators live on the
    device of the predictions: CPU and CUDA give different, equally distributed, points.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed
        self.step = StepCounter()

    def start(self, image_ids: Sequence[int | str], device: torch.device) -> UniformDraws:
        """The draws of one step for these images."""
        iteration = self.step()
        generators = [
            torch.Generator(device).manual_seed(zlib.crc32(f"{self.seed}/{iteration}/{image_id}".encode()))
            for image_id in image_ids
        ]

        def draw(counts: Sequence[int], num_points: int) -> Tensor:
            rows = [
                torch.rand(count, num_points, 2, generator=generator, device=device)
                for count, generator in zip(counts, generators, strict=True)
            ]
            return torch.cat(rows)

        return draw


def uncertain_points(
    mask_logits: Tensor,
    draws: UniformDraws,
    counts: Sequence[int],
    *,
    num_points: int,
    oversample_ratio: float,
    importance_ratio: float,
) -> Tensor:
    """Points near the masks' decision boundary, filled up with uniform ones (PointRend, section 3.1).

    Of ``num_points * oversample_ratio`` random points a mask, the ``num_points * importance_ratio`` with the smallest
    absolute logit, in order of falling uncertainty.

    Args:
        mask_logits: (R, 1, h, w), image after image.
        draws: source of the random points.
        counts: rows of each image; they sum to R.

    Returns:
        (R, num_points, 2), x and y in [0, 1].
    """
    num_uncertain = int(importance_ratio * num_points)
    candidates = draws(counts, int(num_points * oversample_ratio))
    uncertainty = -sample_points(mask_logits, candidates)[:, 0].abs()
    chosen = uncertainty.topk(num_uncertain, dim=1).indices
    points = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    if num_uncertain < num_points:
        points = torch.cat([points, draws(counts, num_points - num_uncertain)], dim=1)
    return points
