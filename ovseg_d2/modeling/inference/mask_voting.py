"""Objects of methods that classify pixels: the pixels of a mask vote for its class, whoever made the mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ovseg_d2.modeling.layers.mask_pooling import pool_binary
from ovseg_d2.structures import MaskProposals


def voted_class_probs(pixel_probs: Tensor, mask_logits: Tensor, void_probs: Tensor | None = None) -> Tensor:
    """Class scores of the masks of one image: the mean over the pixels inside, those with a positive logit.

    Args:
        pixel_probs: (K, H, W) in [0, 1]; classes need not add up to one.
        mask_logits: (Q, H, W).
        void_probs: (Q,) how likely a mask is no object at all; None: not at all.

    Returns:
        (Q, K + 1), the last column for "no object". A mask without a pixel is one for certain.
    """
    votes = pool_binary(pixel_probs[None].float(), mask_logits[None])[0]
    void_probs = votes.new_zeros(len(votes)) if void_probs is None else void_probs.float()
    void_probs = torch.where((mask_logits > 0).flatten(1).any(dim=1), void_probs, 1.0)[:, None]
    return torch.cat([votes * (1 - void_probs), void_probs], dim=1)


def void_probs_of(proposals: MaskProposals) -> Tensor:
    """(N, Q) what a generator says of "no object": 1 for rows that only fill the batch, 0 where it says nothing."""
    void_probs = proposals.mask_logits.new_zeros(proposals.mask_logits.shape[:2], dtype=torch.float32)
    if proposals.class_probs is not None:
        void_probs = proposals.class_probs[..., -1].float()
    elif proposals.class_logits is not None:
        void_probs = proposals.class_logits.float().softmax(dim=-1)[..., -1]
    return void_probs if proposals.valid is None else void_probs.masked_fill(~proposals.valid, 1.0)
