"""MAFT+'s content-dependent transfer (arXiv 2408.00744, section 3.2): class texts that know the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ovseg_d2.modeling.layers.position_encoding import SinePositionEncoding


class ContentDependentTransfer(nn.Module):
    """T' = LN(T + W MHA(T; image)), one set of class rows an image.

    The panoptic variant is T + LN(W MHA(T; image)).
    """

    def __init__(self, *, dim: int, num_heads: int, panoptic: bool = False) -> None:
        """
        Args:
            dim: D, of texts and image features.
            panoptic: the other place of the norm. W then starts as zeros, so that training starts from T itself; the
                public code means to, but its general initialisation overwrites the zeros.
        """
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.position_encoding = SinePositionEncoding(dim=dim)
        self.panoptic = panoptic
        if panoptic:
            nn.init.zeros_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)

    def forward(self, text_rows: Tensor, dense: Tensor) -> Tensor:
        """
        Args:
            text_rows: (E, D), or (N, E, D) one set an image; each row on its own.
            dense: (N, D, h, w) the image's features in CLIP's joint space.

        Returns:
            (N, E, D), not normalised.
        """
        values = dense.flatten(2).transpose(1, 2)
        keys = values + self.position_encoding(dense).flatten(2).transpose(1, 2).to(values.dtype)
        text = text_rows.to(values.dtype).expand(len(dense), -1, -1)
        return self.update(text, query=text, keys=keys, values=values)

    def update(self, x: Tensor, *, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Add what (N, Q, D) queries find in (N, L, D) to ``x`` (N, Q, D), and normalise."""
        found = self.proj(self.attn(query, keys, values, need_weights=False)[0])
        if self.panoptic:
            return x + self.norm(found)
        return self.norm(x + found)


def transferred_logits(mask_embeds: Tensor, text_rows: Tensor, scale: Tensor) -> Tensor:
    """Masks (N, Q, D), of any length, and their image's rows (N, E, D), whose length counts -> logits (N, Q, E)."""
    with torch.autocast(device_type=mask_embeds.device.type, enabled=False):
        directions = nn.functional.normalize(mask_embeds.float(), dim=-1)
        return scale.float() * directions @ text_rows.float().mT
