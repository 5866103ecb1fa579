"""Mask-biased class tokens: CLIP's class token, once a mask, whose attention a mask directs.

One mechanism for two methods. Copies of the class token, one a mask, go through the last blocks beside the image's own
tokens; in every block they are queries to the block's keys and values, with a bias on the logits:

* ``maskclippp`` (MaskCLIP++, arXiv 2412.11464, equation 2): they see the patches only, with a learned bias a head. The
  image's tokens go on as always.
* ``maft`` (MAFT, arXiv 2310.00240, equation 2): they see themselves and the patches of their mask. The patches see no
  class token any more, so the image's own tokens change too.

No mask token sees another, so neither the number of masks nor their order matters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MASK_MODES = ("maskclippp", "maft")
#: What MaskCLIP++ adds outside a mask; finite, so that an empty mask attends to all patches alike.
OUTSIDE_BIAS = -100.0


def soft_mask_bias(masks: Tensor, log_scale: Tensor) -> Tensor:
    """MaskCLIP++: m * exp(s) where m is above half of the mask's largest value, else -100.

    The paper has a binary mask and minus infinity outside; the published weights come from this form. An empty mask
    gives -100 everywhere, that is, plain attention.

    Args:
        masks: (N, Q, h, w) in [0, 1], on the grid of the patches.
        log_scale: (heads,) s.

    Returns:
        (N, heads, Q, h * w).
    """
    masks = masks.flatten(2)
    inside = masks > masks.amax(dim=-1, keepdim=True) / 2
    bias = masks[:, None] * log_scale.exp()[:, None, None]
    return torch.where(inside[:, None], bias, OUTSIDE_BIAS)


def hard_mask_bias(masks: Tensor) -> Tensor:
    """MAFT: 0 where m is at least 0.5, else minus infinity; only for rows that see themselves as well.

    Args:
        masks: (N, Q, h, w) in [0, 1], on the grid of the patches.

    Returns:
        (N, 1, Q, h * w), the same for all heads.
    """
    masks = masks.flatten(2)[:, None]
    return torch.zeros_like(masks).masked_fill(masks < 0.5, float("-inf"))


def attend_masked(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, own: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Attention of mask tokens to patches.

    Args:
        query: (N, heads, Q, C) of the mask tokens.
        key, value: (N, heads, L, C) of the patches.
        bias: (N, heads or 1, Q, L) added to the logits.
        own: keys and values (N, heads, Q, C) of the mask tokens, of which each sees its own alone; None: none.

    Returns:
        (N, heads, Q, C).
    """
    if own is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
    # Written out, with one more column of logits: among the keys of all tokens, the tokens' own would each be hidden
    # from all but one, which costs time and memory quadratic in Q.
    own_key, own_value = own
    query = query * query.shape[-1] ** -0.5
    own_logits = (query * own_key).sum(dim=-1, keepdim=True)
    weights = torch.cat([own_logits, query @ key.mT + bias], dim=-1).softmax(dim=-1).to(value.dtype)
    return weights[..., :1] * own_value + weights[..., 1:] @ value
