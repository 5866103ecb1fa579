"""Losses of methods that classify pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ovseg_d2.structures import SegmentationTargets

#: Label of pixels without a class.
IGNORED = -1


def pixel_labels(targets: Sequence[SegmentationTargets], size: tuple[int, int]) -> Tensor:
    """Masks of N images, (M, H, W) each, as label maps (N, H, W) int64, :data:`IGNORED` where there is no mask.

    Args:
        size: (H, W), also of images without masks.
    """
    labels = []
    for target in targets:
        # A last row that is everywhere: the first mask of a pixel wins, and this one where there is no other.
        everywhere = target.masks.new_ones((1, *size))
        rows = torch.cat([target.masks, everywhere]).to(torch.uint8).argmax(dim=0)
        labels.append(torch.cat([target.class_ids, target.class_ids.new_full((1,), IGNORED)])[rows])
    return torch.stack(labels)


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (N, K, h, w), resized to labels (N, H, W); float32 under autocast.

    The mean over all pixels, ignored ones as zeros, as in the public DenseCLIP and ZegCLIP: an image without labels
    makes no NaN.
    """
    with torch.autocast(device_type=logits.device.type, enabled=False):
        resized = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(resized, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()


def one_hot_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Labels (N, H, W) -> (N, K, H, W) float, ignored pixels 0 for every class."""
    classes = torch.arange(num_classes, device=labels.device)
    return (labels[:, None] == classes[:, None, None]).float()


def pixel_binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of every class, of logits (N, K, h, w), resized to labels (N, H, W); float32 under autocast.

    The mean over all classes and pixels; ignored pixels count, as of no class, as in the public CAT-Seg and FGA-seg
    (whose paper has a cross-entropy, equations 11 and 12).
    """
    with torch.autocast(device_type=logits.device.type, enabled=False):
        resized = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return F.binary_cross_entropy_with_logits(resized, one_hot_labels(labels, logits.shape[1]))


def text_pixel_alignment_loss(logits: Tensor, labels: Tensor, kind: str = "bce") -> Tensor:
    """FGA-seg's T2P loss of logits (N, K, h, w) and labels (N, H, W); float32 under autocast.

    Args:
        kind: ``bce``, of the public code: the mean binary cross-entropy at the logits' size, to which the labels are
            resized. ``mse``, equation 8 of the paper: squared differences of the logits, resized to the labels, and
            1 or 0, summed over the pixels, mean of images and of classes (its mask has no class axis).

    Raises:
        ValueError: another ``kind``.
    """
    if kind == "bce":
        nearest = F.interpolate(labels[:, None].float(), size=logits.shape[-2:], mode="nearest")[:, 0]
        return pixel_binary_cross_entropy(logits, nearest.long())
    if kind != "mse":
        raise ValueError(f"text_pixel_alignment_loss: kind is {kind!r}; expected 'bce' or 'mse'")
    with torch.autocast(device_type=logits.device.type, enabled=False):
        resized = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return F.mse_loss(resized, one_hot_labels(labels, logits.shape[1])) * labels[0].numel()
