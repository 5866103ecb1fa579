"""Pixel features that look at the texts of the classes (FreeSeg, arXiv 2303.17225, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TextAttention(nn.Module):
    """Multi-head attention of one width to another, in a third."""

    def __init__(self, *, dim: int, text_dim: int, inner_dim: int, num_heads: int, dropout: float) -> None:
        """
        Args:
            dim: C, of queries and results.
            text_dim: D, of keys and values.
            inner_dim: in which they are compared, a multiple of ``num_heads``.
            dropout: of the attention weights.
        """
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(dim, inner_dim)
        self.k_proj = nn.Linear(text_dim, inner_dim)
        self.v_proj = nn.Linear(text_dim, inner_dim)
        self.out_proj = nn.Linear(inner_dim, dim)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x: (N, L, C); text: (E, D), the same for all images -> (N, L, C)."""
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
            for y in (self.q_proj(x), self.k_proj(text), self.v_proj(text))
        )
        k, v = (y.expand(len(x), -1, -1, -1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).flatten(-2))


class ContextInteraction(nn.Module):
    """Adds to every pixel's normalised feature what it finds in the texts, times a learned gain a channel.

    Two habits of the public implementation, which its weights were trained with, and which are no part of the paper:
    the skip connection starts at the *normalised* feature, and each map sees the texts that the map before it has
    normalised, normalised once more.
    """

    def __init__(
        self,
        *,
        dim: int,
        text_dim: int,
        inner_dim: int = 2048,
        num_heads: int = 8,
        dropout: float = 0.1,
        init_gain: float = 0.1,
    ) -> None:
        """
        Args:
            dim: C, of the feature maps.
            text_dim: D, of the texts.
            inner_dim, num_heads, dropout: of the attention.
            init_gain: of all channels at first.
        """
        super().__init__()
        self.query_norm = nn.LayerNorm(dim)
        self.text_norm = nn.LayerNorm(text_dim)
        self.attn = TextAttention(dim=dim, text_dim=text_dim, inner_dim=inner_dim, num_heads=num_heads, dropout=dropout)
        self.gamma = nn.Parameter(torch.full((dim,), init_gain))

    def forward(self, maps: Sequence[Tensor], text: Tensor) -> list[Tensor]:
        """
        Args:
            maps: (N, C, h_i, w_i), in the order in which they see the texts.
            text: (E, D), the row of "no object" among them where there is one.

        Returns:
            As many maps of the same shapes.
        """
        results = []
        for feature in maps:
            text = self.text_norm(text)
            x = self.query_norm(feature.flatten(2).transpose(1, 2))
            x = x + self.gamma * self.attn(x, text)
            results.append(x.transpose(1, 2).unflatten(-1, feature.shape[-2:]))
        return results
