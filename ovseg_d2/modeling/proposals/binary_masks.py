"""Masks of zeros and ones as proposals, for generators that give any number of them an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ovseg_d2.structures import ImageBatch, MaskProposals

#: Binary masks as logits: a sigmoid of it is 1 in float32, and a sum of some is still finite in float16.
CERTAIN = 50.0


def binary_proposals(masks: Sequence[Tensor], images: ImageBatch, *, residual_mask: bool) -> MaskProposals:
    """Binary masks as certain logits (N, Q, H, W). Empty masks, and rows that only fill the batch, are not valid.

    Args:
        masks: N tensors (Q_n, H, W) bool at the padded size of the images; Q_n may be 0.
        images: what they are masks of.
        residual_mask: what no mask of an image covers is one more mask, so that every pixel gets a class.
    """
    if residual_mask:
        masks = [_with_residual(m, size) for m, size in zip(masks, images.image_sizes, strict=True)]
    # At least one row: an image without any mask has one that is not valid.
    most = max(1, *(len(m) for m in masks))
    padded = torch.stack([torch.cat([m, m.new_zeros(most - len(m), *m.shape[1:])]) for m in masks])
    logits = torch.where(padded, CERTAIN, -CERTAIN).to(images.tensor.dtype)
    return MaskProposals(mask_logits=logits, valid=padded.flatten(2).any(dim=2))


def _with_residual(masks: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Masks (Q, H, W) of an image, and the one of what they leave over."""
    rest = ~masks.any(dim=0)
    rest[image_size[0] :] = False
    rest[:, image_size[1] :] = False
    return torch.cat([masks, rest[None]])
