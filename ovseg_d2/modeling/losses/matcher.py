"""Bipartite matching of predictions and ground truth (DETR, arXiv 2005.12872, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ovseg_d2.modeling.layers.point_sampling import UniformDraws
from ovseg_d2.modeling.losses.mask_losses import MaskLoss, Match
from ovseg_d2.structures import MaskProposals, SegmentationTargets


@dataclass
class MatchingCosts:
    """Costs of one image, unweighted, each (Q, M)."""

    class_cost: Tensor
    mask_cost: Tensor
    dice_cost: Tensor


class HungarianMatcher(nn.Module):
    """The one-to-one assignment of least total cost, image by image."""

    def __init__(self, *, class_weight: float, mask_weight: float, dice_weight: float, mask_loss: MaskLoss) -> None:
        super().__init__()
        self.class_weight, self.mask_weight, self.dice_weight = class_weight, mask_weight, dice_weight
        self.mask_loss = mask_loss

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
        """The costs of each image."""
        with torch.autocast(device_type=proposals.mask_logits.device.type, enabled=False):
            pairs = self.mask_loss.pair_costs(proposals.mask_logits.float(), targets, draws)
            class_probs = proposals.class_logits.float().softmax(-1)
            return [
                MatchingCosts(-class_probs[i][:, target.class_ids], *costs)
                for i, (target, costs) in enumerate(zip(targets, pairs, strict=True))
            ]

    def forward(
        self, proposals: MaskProposals, targets: Sequence[SegmentationTargets], draws: UniformDraws
    ) -> list[Match]:
        """
        Args:
            proposals: class_logits (N, Q, K + 1), mask_logits (N, Q, h, w).
            targets: ground truth of the N images, masks (M_i, H, W).
            draws: source of random points, for costs on points.

        Returns:
            min(Q, M_i) pairs for each image, on the CPU.
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
