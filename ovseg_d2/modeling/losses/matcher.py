"""Bipartite matching of predictions and ground truth (DETR, section 3.1; on points: Mask2Former, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.layers.point_sampling import UniformDraws, sample_points
from ovseg_d2.structures import MaskProposals, SegmentationTargets

Match = tuple[Tensor, Tensor]
"""Indices of queries, ascending, and of their targets: two (matched,) int64 tensors on the CPU."""


@dataclass
class MatchingCosts:
    """Costs of one image, unweighted, each (Q, M)."""

    class_cost: Tensor
    mask_cost: Tensor
    dice_cost: Tensor


def pairwise_costs(
    class_logits: Tensor, point_logits: Tensor, class_ids: Tensor, point_targets: Tensor
) -> MatchingCosts:
    """Cost of every pair of a query and a target.

    Args:
        class_logits: (Q, K + 1).
        point_logits: (Q, P) mask logits at the points.
        class_ids: (M,) int64.
        point_targets: (M, P) in [0, 1], at the same points.
    """
    class_cost = -class_logits.softmax(-1)[:, class_ids]
    # BCE(x, t) = softplus(x) - x t, so that one matrix product serves all pairs.
    mask_cost = (F.softplus(point_logits).sum(-1)[:, None] - point_logits @ point_targets.T) / point_logits.shape[1]
    probs = point_logits.sigmoid()
    total = probs.sum(-1)[:, None] + point_targets.sum(-1)[None]
    dice_cost = 1 - (2 * (probs @ point_targets.T) + 1) / (total + 1)
    return MatchingCosts(class_cost, mask_cost, dice_cost)


class HungarianMatcher(nn.Module):
    """The one-to-one assignment of least total cost, image by image."""

    def __init__(self, *, class_weight: float, mask_weight: float, dice_weight: float, num_points: int) -> None:
        super().__init__()
        self.class_weight, self.mask_weight, self.dice_weight = class_weight, mask_weight, dice_weight
        self.num_points = num_points

    def total_cost(self, costs: MatchingCosts) -> Tensor:
        return (
            self.class_weight * costs.class_cost
            + self.mask_weight * costs.mask_cost
            + self.dice_weight * costs.dice_cost
        )

    @torch.no_grad()
    def costs(
        self, proposals: MaskProposals, targets: Sequence[SegmentationTargets], draws: UniformDraws
    ) -> list[MatchingCosts]:
        """The costs of each image, on one set of random points an image."""
        with torch.autocast(device_type=proposals.mask_logits.device.type, enabled=False):
            points = draws([1] * len(targets), self.num_points)
            point_logits = sample_points(proposals.mask_logits.float(), points)
            result = []
            for i, target in enumerate(targets):
                point_targets = sample_points(target.masks[None].float(), points[i : i + 1])[0]
                result.append(
                    pairwise_costs(proposals.class_logits[i].float(), point_logits[i], target.class_ids, point_targets)
                )
            return result

    def forward(
        self, proposals: MaskProposals, targets: Sequence[SegmentationTargets], draws: UniformDraws
    ) -> list[Match]:
        """
        Args:
            proposals: class_logits (N, Q, K + 1), mask_logits (N, Q, h, w).
            targets: ground truth of the N images, masks (M_i, H, W).
            draws: source of the random points.

        Returns:
            min(Q, M_i) pairs for each image.
        """
        totals = [self.total_cost(costs) for costs in self.costs(proposals, targets, draws)]
        # One transfer for the whole batch: every .cpu() makes the host wait for the device.
        # Diverged predictions get any assignment: the loss is then NaN too, and the trainer reports it.
        flat = torch.cat([total.flatten() for total in totals]).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).cpu()
        matches = []
        for total, cost in zip(totals, flat.split([total.numel() for total in totals]), strict=True):
            queries, matched = linear_sum_assignment(cost.view(total.shape).numpy())
            matches.append((torch.from_numpy(queries), torch.from_numpy(matched)))
        return matches
