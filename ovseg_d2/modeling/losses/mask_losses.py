"""How masks are compared, in losses of matched masks and in costs of pairs: cross-entropy and dice on sampled points.

Mask2Former, arXiv 2112.01527, section 3.3. ``focal_mask_loss`` has the other way, on whole masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ovseg_d2.modeling.layers.point_sampling import UniformDraws, sample_points, uncertain_points
from ovseg_d2.structures import SegmentationTargets

Match = tuple[Tensor, Tensor]
"""Indices of queries, ascending, and of their targets: two (matched,) int64 tensors."""


class MaskLoss(Protocol):
    """How predicted and true masks are compared.

    Attributes:
        mask_dtype: what the true masks should be converted to, once a step.
    """

    mask_dtype: torch.dtype

    def pair_costs(
        self, mask_logits: Tensor, targets: Sequence[SegmentationTargets], draws: UniformDraws
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each image the mask and the dice costs, (Q, M_i) each, of mask_logits (N, Q, h, w); without gradient."""
        ...

    def matched_losses(
        self,
        mask_logits: Tensor,
        targets: Sequence[SegmentationTargets],
        matches: Sequence[Match],
        draws: UniformDraws,
    ) -> tuple[Tensor, Tensor]:
        """Sums over the matched masks of both losses of mask_logits (N, Q, h, w); connected to it without any match."""
        ...


def dice_losses(probs: Tensor, targets: Tensor) -> Tensor:
    """(R, P) probabilities and values in [0, 1] -> (R,)."""
    overlap = (probs * targets).sum(-1)
    return 1 - (2 * overlap + 1) / (probs.sum(-1) + targets.sum(-1) + 1)


def pairwise_dice(probs: Tensor, targets: Tensor) -> Tensor:
    """Dice losses of all pairs of (Q, P) probabilities and (M, P) values in [0, 1] -> (Q, M)."""
    total = probs.sum(-1)[:, None] + targets.sum(-1)[None]
    return 1 - (2 * (probs @ targets.T) + 1) / (total + 1)


class PointMaskLoss:
    """Cross-entropy and dice on points: uniform ones for the costs, ones in uncertain places for the losses."""

    mask_dtype = torch.float32  # bilinear reads need floats

    def __init__(self, *, num_points: int, oversample_ratio: float = 3.0, importance_ratio: float = 0.75) -> None:
        """
        Args:
            num_points: points a mask.
            oversample_ratio, importance_ratio: see :func:`uncertain_points`.
        """
        self.num_points = num_points
        self.oversample_ratio, self.importance_ratio = oversample_ratio, importance_ratio

    def pair_costs(
        self, mask_logits: Tensor, targets: Sequence[SegmentationTargets], draws: UniformDraws
    ) -> list[tuple[Tensor, Tensor]]:
        """On one set of random points an image."""
        points = draws([1] * len(targets), self.num_points)
        point_logits = sample_points(mask_logits, points)
        costs = []
        for i, target in enumerate(targets):
            point_targets = sample_points(target.masks[None].float(), points[i : i + 1])[0]
            mask_cost = pairwise_cross_entropy(point_logits[i], point_targets)
            costs.append((mask_cost, pairwise_dice(point_logits[i].sigmoid(), point_targets)))
        return costs

    def matched_losses(
        self,
        mask_logits: Tensor,
        targets: Sequence[SegmentationTargets],
        matches: Sequence[Match],
        draws: UniformDraws,
    ) -> tuple[Tensor, Tensor]:
        device = mask_logits.device
        counts = [len(queries) for queries, _ in matches]
        images = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)
        logits = mask_logits[images, torch.cat([queries for queries, _ in matches])][:, None]
        with torch.no_grad():
            points = self.loss_points(logits, draws, counts)
            point_targets = torch.cat(
                [
                    # Points are put in the targets' order, so that no full-size mask is copied.
                    _sample_matched(target.masks, matched, image_points)
                    for target, (_, matched), image_points in zip(targets, matches, points.split(counts), strict=True)
                ]
            )
        point_logits = sample_points(logits, points)[:, 0]
        ce = F.binary_cross_entropy_with_logits(point_logits, point_targets, reduction="none").mean(1)
        return ce.sum(), dice_losses(point_logits.sigmoid(), point_targets).sum()

    def loss_points(self, matched_logits: Tensor, draws: UniformDraws, counts: Sequence[int]) -> Tensor:
        """(R, 1, h, w) logits of matched masks, image after image -> (R, P, 2)."""
        return uncertain_points(
            matched_logits,
            draws,
            counts,
            num_points=self.num_points,
            oversample_ratio=self.oversample_ratio,
            importance_ratio=self.importance_ratio,
        )


def pairwise_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropies of all pairs of (Q, P) logits and (M, P) values in [0, 1] -> (Q, M)."""
    # BCE(x, t) = softplus(x) - x t, so that one matrix product serves all pairs.
    return (F.softplus(logits).sum(-1)[:, None] - logits @ targets.T) / logits.shape[1]


def _sample_matched(masks: Tensor, matched: Tensor, points: Tensor) -> Tensor:
    """Values of ``masks[matched]`` (R of M, H, W) at points (R, P, 2) -> (R, P)."""
    order = matched.argsort()
    chosen = masks if len(matched) == len(masks) else masks[matched[order]]
    sampled = sample_points(chosen[:, None], points[order])[:, 0]
    return sampled[order.argsort()]
