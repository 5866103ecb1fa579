"""Attention whose queries and keys see guidance beside the cost volume (CAT-Seg, arXiv 2303.11797)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.pixel_classification.class_rows import ClassRows

ATTENTIONS = ("linear", "full")
#: Added to the sum of the weights of linear attention.
EPS = 1e-6


class TwoLinears(nn.Module):
    """A linear layer, an activation, a linear layer."""

    def __init__(self, *, dim: int, hidden_dim: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.linear2(self.activation(self.linear1(x)))


class GuidedProjection(nn.Module):
    """Queries and keys of [x; guidance], values of x alone.

    The guidance is projected once for all rows that share it, and added.
    """

    def __init__(self, *, dim: int, guidance_dim: int) -> None:
        super().__init__()
        self.q = nn.Linear(dim + guidance_dim, dim)
        self.k = nn.Linear(dim + guidance_dim, dim)
        self.v = nn.Linear(dim, dim)

    def forward(self, x: Tensor, guidance: Tensor, rows: ClassRows | None = None) -> Tensor:
        """
        Args:
            x: (R, ..., C).
            guidance: (R, ..., G), or (N, ..., G) where ``rows`` say whose it is; broadcast over positions.

        Returns:
            (R, ..., 3C), queries, keys and values.
        """
        dim = x.shape[-1]
        own, guided = torch.cat([self.q.weight, self.k.weight]).split([dim, guidance.shape[-1]], dim=1)
        biases = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        qkv = F.linear(x, torch.cat([own, self.v.weight]), biases)
        shared = F.linear(guidance, guided)
        qkv[..., : 2 * dim] += shared if rows is None else rows.of_images(shared)
        return qkv


class ClassAttention(nn.Module):
    """Self-attention of an image's classes, at every position by itself; no projection of the output.

    "linear": phi(q) (phi(k)^T v) / (phi(q) sum phi(k)), phi = elu + 1 (arXiv 2006.16236); "full": softmax.
    """

    def __init__(self, *, dim: int, guidance_dim: int, num_heads: int, kind: str) -> None:
        """
        Raises:
            ValueError: another kind than "linear" or "full".
        """
        super().__init__()
        if kind not in ATTENTIONS:
            raise ValueError(f"MODEL.OVSEG.FGA_SEG.CLASS_ATTENTION is {kind!r}; expected one of {list(ATTENTIONS)}")
        self.num_heads = num_heads
        self.qkv = GuidedProjection(dim=dim, guidance_dim=guidance_dim)
        self.kind = kind

    def forward(
        self, rows: ClassRows, x: Tensor, guidance: Tensor, pad: tuple[Tensor, Tensor, Tensor] | None
    ) -> Tensor:
        """
        Args:
            rows: which image each row is of.
            x: (R, h, w, C).
            guidance: (R, G).
            pad: a class (C,) that each image has besides, its guidance (G,), and how many times each does, (N,).

        Returns:
            (R, h, w, C).
        """
        qkv = self.qkv(x, guidance[:, None, None])
        packed, taken = rows.packed()
        # (N, T, h, w, 3C) -> 3 times (N, h * w, heads, T, C / heads); places that are not taken hold zeros
        entries = packed.to_entries(qkv, fill=0.0).flatten(2, 3)
        q, k, v = entries.unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 2, 4, 1, 5)
        pad_k = pad_v = pad_count = None
        if pad is not None:
            token, pad_guidance, pad_count = pad
            _, pad_k, pad_v = self.qkv(token, pad_guidance).unflatten(-1, (3, self.num_heads, -1))
        attend = _linear_attention if self.kind == "linear" else _full_attention
        out = attend(q, k, v, taken, pad_k, pad_v, pad_count)
        out = out.permute(0, 3, 1, 2, 4).flatten(-2).unflatten(2, x.shape[1:3])  # (N, T, h, w, C)
        return packed.of_entries(out)


def _linear_attention(
    q: Tensor, k: Tensor, v: Tensor, taken: Tensor | None, pad_k: Tensor | None, pad_v: Tensor | None, pad_count: Tensor
) -> Tensor:
    """q, k, v (N, L, heads, T, d), taken (N, T), pad_k and pad_v (heads, d), pad_count (N,) -> (N, L, heads, T, d).

    In float32 under autocast: the sums over hundreds of classes are beyond what float16 holds.
    """
    dtype = q.dtype
    with torch.autocast(device_type=q.device.type, enabled=False):
        q, k, v = F.elu(q.float()) + 1, F.elu(k.float()) + 1, v.float()
        if taken is not None:
            k = k * taken[:, None, None, :, None]
        weighted, total = k.mT @ v, k.sum(dim=-2)  # (N, L, heads, d, d), (N, L, heads, d)
        if pad_k is not None:
            pad_k, pad_v = F.elu(pad_k.float()) + 1, pad_v.float()
            count = pad_count.float()[:, None, None, None]
            weighted = weighted + count[..., None] * (pad_k[..., :, None] * pad_v[..., None, :])
            total = total + count * pad_k
        return ((q @ weighted) / ((q @ total[..., None]) + EPS)).to(dtype)


def _full_attention(
    q: Tensor, k: Tensor, v: Tensor, taken: Tensor | None, pad_k: Tensor | None, pad_v: Tensor | None, pad_count: Tensor
) -> Tensor:
    """As :func:`_linear_attention`. A class that is there m times is there once with log m added to its logit."""
    n, length, heads, num_classes, _ = q.shape
    bias = None
    if taken is not None:
        bias = q.new_zeros(n, num_classes).masked_fill(~taken, float("-inf"))
    if pad_k is not None:
        bias = q.new_zeros(n, num_classes) if bias is None else bias
        bias = torch.cat([bias, pad_count.to(q.dtype).log()[:, None]], dim=1)
        k, v = (torch.cat([y, p[:, None].expand(n, length, -1, -1, -1)], dim=-2) for y, p in ((k, pad_k), (v, pad_v)))
    if bias is not None:
        bias = bias[:, None, None, None].expand(-1, length, -1, -1, -1).flatten(0, 1)
    out = F.scaled_dot_product_attention(*(y.flatten(0, 1) for y in (q, k, v)), attn_mask=bias)
    return out.unflatten(0, (n, length))
