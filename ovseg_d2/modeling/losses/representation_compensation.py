"""MAFT+'s representation compensation (arXiv 2408.00744, section 3.3): a tuned CLIP's last map stays near that of the
CLIP it came from, at several scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def representation_compensation_loss(student: Tensor, teacher: Tensor, *, scales: Sequence[int] = (1, 2, 4)) -> Tensor:
    """Smooth L1 distance of the sums over rows and over columns of both maps, pooled at each scale.

    Args:
        student, teacher: (N, C, h, w); what is negative does not count.
        scales: cells a side at each scale, if it divides the width.

    Returns:
        Scalar, the mean over all sums; not weighted.
    """
    return F.smooth_l1_loss(_strip_sums(student, scales), _strip_sums(teacher, scales))


def _strip_sums(dense: Tensor, scales: Sequence[int]) -> Tensor:
    """(N, C, h, w) -> (N, number of sums)."""
    dense = dense.float().clamp(min=0)
    height, width = dense.shape[-2:]
    if height != width:
        side = max(height, width)
        dense = F.interpolate(dense, size=(side, side), mode="bilinear", align_corners=False)
    sums = []
    for scale in scales:
        # The width before the map was made square, as in the public code; a map of fewer cells is not pooled.
        pooled = F.avg_pool2d(dense, max(width // scale, 1))
        sums += [pooled.sum(dim=-2).flatten(1), pooled.sum(dim=-1).flatten(1)]
    return torch.cat(sums, dim=1)
