"""t-SNE (van der Maaten and Hinton, JMLR 9, 2008), exact: for a few thousand points, without another package."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-12


def tsne(points: Tensor, *, perplexity: float = 20.0, steps: int = 500) -> Tensor:
    """(L, D) -> (L, 2) float32; the same points give the same picture, as it starts from their principal components.

    Args:
        perplexity: about how many neighbours a point has; lowered for few points.
        steps: of gradient descent, the first quarter with exaggerated neighbours.
    """
    points = points.double()
    joint = joint_probs(points, min(perplexity, max((len(points) - 1) / 3, 1.0)))
    centred = points - points.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    y = torch.zeros(len(points), 2, dtype=points.dtype, device=points.device)
    start = centred @ axes[:2].T
    y[:, : start.shape[1]] = 1e-2 * start / start.std(dim=0).clamp(min=_EPS)[:1]
    velocity, gains = torch.zeros_like(y), torch.ones_like(y)
    rate = max(len(points) / 12 / 4, 10.0)
    for step in range(steps):
        early = step < steps // 4
        gradient = tsne_gradient(y, joint * (12.0 if early else 1.0))
        gains = torch.where(gradient * velocity < 0, gains + 0.2, gains * 0.8).clamp(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * gradient
        y = y + velocity
        y = y - y.mean(0)
    return y.float()


def joint_probs(points: Tensor, perplexity: float) -> Tensor:
    """Symmetric p (L, L), whose rows had that perplexity before they were made symmetric (equation 1)."""
    distances = torch.cdist(points, points).square().fill_diagonal_(torch.inf)
    low, high = torch.full((2, len(points), 1), -60.0, dtype=points.dtype, device=points.device)
    high = high + 120.0
    target = torch.tensor(perplexity, dtype=points.dtype).log()
    nearest = distances.amin(dim=1, keepdim=True)  # the largest weight is 1, so none of the sums vanishes
    for _ in range(60):  # bisection of the logarithm of the precision
        middle = (low + high) / 2
        p = (-(distances - nearest) * middle.exp()).exp()
        p = p / p.sum(dim=1, keepdim=True)
        entropy = -(p * (p + _EPS).log()).sum(dim=1, keepdim=True)
        too_wide = entropy > target
        low, high = torch.where(too_wide, middle, low), torch.where(too_wide, high, middle)
    return (p + p.T) / (2 * len(points))


def tsne_gradient(y: Tensor, joint: Tensor) -> Tensor:
    """Of the divergence of p and q with respect to y (L, 2) (equation 5)."""
    weights = 1 / (1 + torch.cdist(y, y).square())
    weights.fill_diagonal_(0.0)
    q = weights / weights.sum()
    forces = (joint - q) * weights
    return 4 * (forces.sum(dim=1, keepdim=True) * y - forces @ y)
