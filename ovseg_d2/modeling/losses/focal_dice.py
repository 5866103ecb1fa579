"""Focal loss and dice of class maps, the loss of ZegCLIP (arXiv 2212.03588, section 3.4) and LDVC."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ovseg_d2.modeling.losses.focal_mask_loss import unweighted_focal
from ovseg_d2.modeling.losses.pixel_losses import IGNORED
from ovseg_d2.modeling.losses.set_criterion import all_reduced_mean


class FocalDiceLoss:
    """Every class of an image is a mask of its own.

    The focal loss is of all K classes, the mean over the pixels of each map; dice of the classes that the image shows.
    Both are sums over maps and images, divided by the number of classes shown, all images together. In the public
    ZegCLIP, pixels without a class (ignored, padding, in inductive training the unseen classes) are of no class: they
    are negatives of all classes in the focal loss and count as predicted area in dice.
    """

    def __init__(
        self,
        *,
        focal_weight: float = 100.0,
        dice_weight: float = 1.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        mask_ignored: bool = False,
    ) -> None:
        """
        Args:
            focal_weight, dice_weight: of the two losses.
            alpha, gamma: see :class:`FocalMaskLoss`.
            mask_ignored: leave pixels without a class out of both losses.
        """
        self.focal_weight, self.dice_weight = focal_weight, dice_weight
        self.alpha, self.gamma = alpha, gamma
        self.mask_ignored = mask_ignored

    def __call__(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``loss_focal`` and ``loss_dice``, weighted; float32 under autocast.

        Args:
            logits: (N, K, h, w), resized bilinearly to the labels.
            labels: (N, H, W) int64, classes in [0, K) or ``IGNORED``.
        """
        num_classes, size = logits.shape[1], labels.shape[-2:]
        labels = labels.flatten(1)
        areas = class_areas(labels, num_classes)
        with torch.autocast(device_type=logits.device.type, enabled=False):
            resized = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False).flatten(2)
            focal, dice = self._class_losses(resized, labels, areas)
            count = all_reduced_mean((areas > 0).sum().float()).clamp(min=1)
        return {"loss_focal": self.focal_weight * focal / count, "loss_dice": self.dice_weight * dice / count}

    def _class_losses(self, logits: Tensor, labels: Tensor, areas: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over images and classes of (N, K, P) logits and (N, P) labels, which have ``areas`` (N, K).

        K maps at full size are large, and all but one of them are negative at a pixel: what is positive is read at the
        labels, instead of comparing with K true maps.
        """
        labelled, index = labels != IGNORED, labels.clamp(min=0)[:, None]
        true = logits.gather(1, index)
        wrong = logits.scatter(1, index, torch.where(labelled[:, None], -true, true))
        num_pixels = torch.full_like(labels[:, 0], labels.shape[1])
        if self.mask_ignored:
            wrong = wrong.masked_fill(~labelled[:, None], float("-inf"))
            num_pixels = labelled.sum(dim=1).clamp(min=1)
        true = true[:, 0]

        # Everywhere the weight of pixels outside a mask, and at the labels what those inside have beyond it.
        focal = (1 - self.alpha) * unweighted_focal(wrong, self.gamma).flatten(1).sum(dim=1)
        inside = torch.where(labelled, unweighted_focal(-true, self.gamma), 0.0).sum(dim=1)
        focal = (focal + (2 * self.alpha - 1) * inside) / num_pixels

        # The same for the predicted area: at the labels the probability of being right in place of being wrong.
        hit, missed = (torch.where(labelled, logit.sigmoid(), 0.0) for logit in (true, -true))
        overlap, gap = (
            torch.zeros_like(areas, dtype=logits.dtype).scatter_add(1, index[:, 0], probs) for probs in (hit, missed)
        )
        predicted = wrong.sigmoid().sum(dim=2) - gap + overlap
        dice = 1 - (2 * overlap + 1) / (predicted + areas + 1)
        return focal.sum(), (dice * (areas > 0)).sum()


def class_areas(labels: Tensor, num_classes: int) -> Tensor:
    """(N, P) int64 labels, ``IGNORED`` for none -> (N, K) int64, the pixels of each class."""
    # The first column is that of ignored pixels.
    areas = labels.new_zeros((len(labels), num_classes + 1))
    return areas.scatter_add_(1, labels - IGNORED, torch.ones_like(labels))[:, 1:]
