"""One vector for a region: the mean of the features inside its mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def downsample_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize masks or mask logits bilinearly, without antialiasing: small masks can vanish, as in the public models.

    Args:
        masks: (N, Q, H, W) float; Q may be 0.
        size: (h, w).

    Returns:
        (N, Q, h, w).
    """
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    # Masks as a batch: interpolate takes no tensor without channels.
    resized = F.interpolate(masks.flatten(0, 1)[:, None], size=size, mode="bilinear", align_corners=False)
    return resized.view(*masks.shape[:2], *size)


def pool_soft(features: Tensor, masks: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Mean weighted by masks (MaskCLIP++, equation 1); their gradient is kept. An empty mask gives zeros.

    Args:
        features: (N, C, h, w).
        masks: (N, Q, H, W) in [0, 1]; resized to the features where the sizes differ.

    Returns:
        (N, Q, C).
    """
    return _weighted_mean(features, downsample_masks(masks, features.shape[-2:]), eps)


def pool_binary(features: Tensor, mask_logits: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Mean over the positions whose resized logit is positive (FC-CLIP). An empty mask gives zeros.

    Args:
        features: (N, C, h, w).
        mask_logits: (N, Q, H, W); no gradient goes to them.

    Returns:
        (N, Q, C).
    """
    inside = downsample_masks(mask_logits.detach(), features.shape[-2:]) > 0
    return _weighted_mean(features, inside, eps)


def _weighted_mean(features: Tensor, weights: Tensor, eps: float) -> Tensor:
    # In half precision eps would be nothing, and the area of a large mask infinite.
    weights = weights.float()
    weights = weights / (weights.sum(dim=(-2, -1), keepdim=True) + eps)
    return torch.einsum("nchw,nqhw->nqc", features, weights.to(features.dtype))
