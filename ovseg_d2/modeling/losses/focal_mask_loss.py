"""Focal loss and dice on whole masks (MaskFormer, arXiv 2107.06278, section 3.3).

ZegFormer, ZSSeg, OVSeg and FreeSeg train their mask generators with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ovseg_d2.modeling.layers.point_sampling import UniformDraws
from ovseg_d2.modeling.losses.mask_losses import Match, dice_losses, pairwise_dice
from ovseg_d2.structures import SegmentationTargets


class FocalMaskLoss:
    """Focal loss (arXiv 1708.02002, equation 5) and dice on all pixels.

    Costs are taken at the predictions' size, true masks being reduced to it by nearest pixels; losses at the true
    masks' size, matched predictions being enlarged to it bilinearly (not with aligned corners, in FreeSeg neither,
    although its inference aligns them).
    """

    mask_dtype = torch.bool

    def __init__(self, *, alpha: float = 0.25, gamma: float = 2.0) -> None:
        """
        Args:
            alpha: weight of pixels inside a true mask; those outside have 1 - alpha.
            gamma: how much the loss turns to pixels that are still wrong.
        """
        self.alpha, self.gamma = alpha, gamma

    def pair_costs(
        self, mask_logits: Tensor, targets: Sequence[SegmentationTargets], draws: UniformDraws
    ) -> list[tuple[Tensor, Tensor]]:
        """``draws`` is not used."""
        size = mask_logits.shape[-2:]
        costs = []
        for logits, target in zip(mask_logits.flatten(2), targets, strict=True):
            # Nearest resizing knows bytes, but neither bool nor an empty batch.
            masks = target.masks.new_zeros((0, *size), dtype=torch.uint8)
            if len(target):
                masks = F.interpolate(target.masks[:, None].to(torch.uint8), size=size, mode="nearest")[:, 0]
            masks = masks.flatten(1).to(logits.dtype)
            costs.append((self.pairwise_focal(logits, masks), pairwise_dice(logits.sigmoid(), masks)))
        return costs

    def pairwise_focal(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean focal losses of all pairs of (Q, P) logits and (M, P) values in [0, 1] -> (Q, M)."""
        probs = logits.sigmoid()
        inside = self.alpha * (1 - probs) ** self.gamma * F.softplus(-logits)
        outside = (1 - self.alpha) * probs**self.gamma * F.softplus(logits)
        # inside t + outside (1 - t), with one matrix product.
        return ((inside - outside) @ targets.T + outside.sum(-1)[:, None]) / logits.shape[1]

    def matched_losses(
        self,
        mask_logits: Tensor,
        targets: Sequence[SegmentationTargets],
        matches: Sequence[Match],
        draws: UniformDraws,
    ) -> tuple[Tensor, Tensor]:
        """``draws`` is not used. One image at a time, and again in the backward pass.

        Full-size maps of all matched masks, images and layers would otherwise be held together.
        """
        focal = dice = mask_logits[:0].sum()
        for logits, target, (queries, matched) in zip(mask_logits, targets, matches, strict=True):
            if not len(queries):
                continue
            image_focal, image_dice = checkpoint(
                self._image_losses,
                logits[queries],
                target.masks,
                matched,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            focal, dice = focal + image_focal, dice + image_dice
        return focal, dice

    def _image_losses(self, logits: Tensor, masks: Tensor, matched: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over R masks: (R, h, w) logits, (M, H, W) bool, and which of the M belong to the R."""
        masks = masks[matched].bool()
        logits = F.interpolate(logits[:, None], size=masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        weights = torch.where(masks, self.alpha, 1 - self.alpha)
        focal = weights * unweighted_focal(torch.where(masks, -logits, logits), self.gamma)
        return focal.flatten(1).mean(1).sum(), dice_losses(logits.sigmoid().flatten(1), masks.flatten(1)).sum()


def unweighted_focal(wrong_logits: Tensor, gamma: float) -> Tensor:
    """Focal loss (arXiv 1708.02002, equation 4) of logits of being wrong; of the same shape.

    Args:
        gamma: how much the loss turns to what is still wrong.
    """
    return wrong_logits.sigmoid() ** gamma * F.softplus(wrong_logits)
