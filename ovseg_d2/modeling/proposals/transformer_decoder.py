"""Transformer decoder of MaskFormer (arXiv 2107.06278, section 3.3), which is DETR's (arXiv 2005.12872, appendix A)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ovseg_d2.modeling.layers.attention import MLP, ResidualAttention, ResidualFFN
from ovseg_d2.modeling.layers.position_encoding import SinePositionEncoding
from ovseg_d2.structures import MaskProposals, TextClasses


class TransformerDecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward."""

    def __init__(self, *, dim: int, num_heads: int, ffn_dim: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        attention = {"dim": dim, "num_heads": num_heads, "dropout": dropout, "pre_norm": pre_norm}
        self.self_attn = ResidualAttention(**attention)
        self.cross_attn = ResidualAttention(**attention)
        self.ffn = ResidualFFN(dim=dim, ffn_dim=ffn_dim, dropout=dropout, pre_norm=pre_norm)

    def forward(self, x: Tensor, x_pos: Tensor, memory: Tensor, memory_with_pos: Tensor) -> Tensor:
        """x, x_pos: (N, Q, C); memory, memory_with_pos: (N, L, C) -> (N, Q, C)."""
        x = self.self_attn(x, x_pos)
        x = self.cross_attn(x, x_pos, memory=memory, memory_with_pos=memory_with_pos)
        return self.ffn(x)


class TransformerMaskDecoder(nn.Module):
    """Learned queries attend to one feature map; after each layer they predict masks and classes."""

    def __init__(
        self,
        *,
        in_dim: int,
        dim: int,
        mask_dim: int,
        class_head: nn.Module | None,
        num_queries: int,
        num_heads: int,
        ffn_dim: int,
        num_layers: int,
        dropout: float = 0.0,
        pre_norm: bool = False,
        enforce_input_proj: bool = False,
    ) -> None:
        """
        Args:
            in_dim: channels of the feature map; projected to ``dim`` if they differ or ``enforce_input_proj`` is set.
            class_head: queries, masks, per-pixel features and classes -> class logits (``class_heads.py``);
                None for masks without classes.
            num_layers: at least 1.
        """
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerDecoderLayer(dim=dim, num_heads=num_heads, ffn_dim=ffn_dim, dropout=dropout, pre_norm=pre_norm)
            for _ in range(num_layers)
        )
        self.query_embed = nn.Embedding(num_queries, dim)
        project = in_dim != dim or enforce_input_proj
        self.input_proj = nn.Conv2d(in_dim, dim, 1) if project else nn.Identity()
        self.position_encoding = SinePositionEncoding(dim=dim)
        self.decoder_norm = nn.LayerNorm(dim)
        self.class_embed = class_head  # the name that all mask decoders have for it
        self.mask_embed = MLP(in_dim=dim, hidden_dim=dim, out_dim=mask_dim, num_layers=3)
        if project:
            nn.init.kaiming_uniform_(self.input_proj.weight, a=1)
            nn.init.zeros_(self.input_proj.bias)

    def forward(self, feature: Tensor, mask_features: Tensor, text: TextClasses | None = None) -> MaskProposals:
        """
        Args:
            feature: (N, in_dim, h', w').
            mask_features: (N, mask_dim, h, w).
            text: classes for a class head that needs them.

        Returns:
            The last layer's proposals; in training ``aux`` holds those of all earlier layers.
        """
        memory = self.input_proj(feature).flatten(2).transpose(1, 2)
        memory_with_pos = memory + self.position_encoding(feature).flatten(2).transpose(1, 2)
        x_pos = self.query_embed.weight.expand(len(feature), -1, -1)
        x = torch.zeros_like(x_pos)
        aux: list[MaskProposals] = []
        for layer in self.layers:
            x = layer(x, x_pos, memory, memory_with_pos)
            if self.training and layer is not self.layers[-1]:
                aux.append(self._predict(x, mask_features, text))
        proposals = self._predict(x, mask_features, text)
        proposals.aux = aux
        return proposals

    def _predict(self, x: Tensor, mask_features: Tensor, text: TextClasses | None) -> MaskProposals:
        queries = self.decoder_norm(x)
        mask_logits = torch.einsum("nqc,nchw->nqhw", self.mask_embed(queries), mask_features)
        class_logits = None
        if self.class_embed is not None:
            class_logits = self.class_embed(queries, mask_logits, mask_features, text)
        return MaskProposals(mask_logits=mask_logits, class_logits=class_logits, query_embeds=queries)
