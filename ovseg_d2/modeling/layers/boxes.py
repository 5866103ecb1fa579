"""Boxes of masks."""

from __future__ import annotations

import torch
from torch import Tensor


def bounding_boxes(masks: Tensor) -> Tensor:
    """Tight boxes (n, 4) x0, y0, x1, y1 of masks (n, H, W) bool, x1 and y1 just outside; zeros for empty masks."""
    edges = []
    for occupied in (masks.any(1), masks.any(2)):
        first = occupied.int().argmax(1)
        last = occupied.shape[1] - occupied.flip(1).int().argmax(1)
        edges.append(torch.stack([first, last], dim=1) * occupied.any(1)[:, None])
    (x0, x1), (y0, y1) = (edge.unbind(1) for edge in edges)
    return torch.stack([x0, y0, x1, y1], dim=1).float()
