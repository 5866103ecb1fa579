"""Learned tokens between CLIP's class token and its patches (VPT-deep, arXiv 2203.12119, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class DeepImagePrompts(nn.Module):
    """P tokens for every block, in place of what the block before made of them (ZegCLIP, LDVC).

    They are inserted behind the position table and CLIP's first norm, so they have neither.
    """

    def __init__(self, *, num_layers: int, num_tokens: int, dim: int, patch_size: int, dropout: float = 0.1) -> None:
        """
        Args:
            num_layers: blocks with prompts, from the first; those behind run without.
            num_tokens: P.
            dim: C, the width of the tower.
            patch_size: of the tower; VPT draws the initial values by it.
        """
        super().__init__()
        self.embeddings = nn.Parameter(torch.empty(num_layers, num_tokens, dim))
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.last_norm = nn.LayerNorm(dim, eps=1e-6)
        limit = math.sqrt(6 / (3 * patch_size**2 + dim))
        nn.init.uniform_(self.embeddings, -limit, limit)
        nn.init.kaiming_normal_(self.proj.weight, mode="fan_out")

    def insert(self, index: int, x: Tensor, num_patches: int) -> Tensor:
        """What enters block ``index``: (N, 1 + L, C), or with the last block's prompts, -> (N, 1 + P + L, C)."""
        parts = [x[:, :1], x[:, -num_patches:]]
        if index < len(self.embeddings):
            prompts = self.dropout(self.proj(self.embeddings[index].expand(len(x), -1, -1)))
            parts.insert(1, prompts.to(x.dtype))
        return torch.cat(parts, dim=1)

    def norm(self, x: Tensor) -> Tensor:
        """After the last block, before CLIP's own last norm: (N, L, C) -> (N, L, C)."""
        return self.last_norm(x)
