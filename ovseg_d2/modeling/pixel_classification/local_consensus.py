"""Dense features that texts guide (LDVC, arXiv 2403.08426, section 3.4): text adapter and local-consensus decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ovseg_d2.modeling.layers.attention import CrossAttention, ResidualFFN
from ovseg_d2.modeling.pixel_classification.routing_attention import LocalConsensusAttention


class TextAdapter(nn.Linear):
    """Texts that know an image: T_new = Linear([T * V_g; T]) (equation 3), which is ZegCLIP's relation descriptor
    (arXiv 2212.03588)."""

    def __init__(self, *, dim: int) -> None:
        """``dim``: D, of CLIP's joint space."""
        super().__init__(2 * dim, dim)

    @staticmethod
    def relations(image_embeds: Tensor, text: Tensor) -> Tensor:
        """(N, D) and (K, D) -> (N, K, 2D), the products first."""
        products = text * image_embeds[:, None]
        return torch.cat([products, text.expand_as(products)], dim=-1)

    def forward(self, image_embeds: Tensor, text: Tensor) -> Tensor:
        """
        Args:
            image_embeds: (N, D) unit vectors, CLIP's global embeddings.
            text: (K, D) unit vectors.

        Returns:
            (N, K, D) one set of texts an image, not normalised.
        """
        return super().forward(self.relations(image_embeds, text))


class LocalConsensusBlock(nn.Module):
    """A map of an encoder layer is added, then self-attention, cross-attention to the texts and an MLP, each normalised
    before and added to its input (equations 4 to 7)."""

    def __init__(
        self,
        *,
        dim: int,
        layer_dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        scale: str,
        self_attention: LocalConsensusAttention,
        conv_zero_init: bool,
        norm_layers: bool,
    ) -> None:
        """See :class:`LocalConsensusDecoder`."""
        super().__init__()
        self.layer_norm = nn.LayerNorm(layer_dim) if norm_layers else nn.Identity()
        self.conv = nn.Linear(layer_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.self_attention = self_attention
        self.query_norm, self.text_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.cross_attention = CrossAttention(dim=dim, num_heads=num_heads, scale=scale, dropout=dropout)
        self.ffn = ResidualFFN(dim=dim, ffn_dim=ffn_dim, pre_norm=True, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        if conv_zero_init:
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, text: Tensor, layer: Tensor) -> Tensor:
        """
        Args:
            x: (N, h, w, D).
            text: (N, K, D), queried as keys and values, and left as it is.
            layer: (N, C, h, w) the encoder's map.

        Returns:
            (N, h, w, D).
        """
        x = x + self.conv(self.layer_norm(layer.permute(0, 2, 3, 1)))
        x = x + self.dropout(self.self_attention(self.norm(x)))
        pixels = self.query_norm(x).flatten(1, 2)
        x = x + self.cross_attention(pixels, self.text_norm(text)).view_as(x)
        return self.ffn(x)


class LocalConsensusDecoder(nn.Module):
    """LCTD: pixels as queries move towards the texts, which stay what they are; logits are the products of the two
    (equation 13), not normalised and without temperature."""

    def __init__(
        self,
        *,
        dim: int,
        layer_dim: int,
        num_blocks: int = 2,
        num_heads: int = 8,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        window_size: int = 4,
        top_k: int = 16,
        scale: str = "head",
        form: str = "auto",
        conv_zero_init: bool = False,
        norm_layers: bool = False,
    ) -> None:
        """
        Args:
            dim: D, of CLIP's joint space.
            layer_dim: C, of the encoder's layers.
            num_blocks: blocks (table 9), each with a layer of the encoder.
            num_heads: of both attentions.
            ffn_dim: hidden width of the MLP.
            dropout: of the three updates and of the hidden layer.
            window_size, top_k, form: see :class:`LocalConsensusAttention`; ``top_k`` 0 is the decoder without LCSA.
            scale: of both attentions, "head" or "dim".
            conv_zero_init: the encoder's layers add nothing at first; otherwise they outweigh the unit vectors that the
                decoder starts from.
            norm_layers: normalise the encoder's layers before they are projected.

        Raises:
            ValueError: no block at all, or see :class:`LocalConsensusAttention`.
        """
        super().__init__()
        if num_blocks < 1:
            raise ValueError(f"MODEL.OVSEG.LDVC.TAPS has {num_blocks} layers; expected 1 or more, one for each block")
        self.blocks = nn.ModuleList(
            LocalConsensusBlock(
                dim=dim,
                layer_dim=layer_dim,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                dropout=dropout,
                scale=scale,
                self_attention=LocalConsensusAttention(
                    dim=dim, num_heads=num_heads, window_size=window_size, top_k=top_k, scale=scale, form=form
                ),
                conv_zero_init=conv_zero_init,
                norm_layers=norm_layers,
            )
            for _ in range(num_blocks)
        )

    def features(self, dense: Tensor, text: Tensor, layers: Sequence[Tensor]) -> list[Tensor]:
        """What each block makes of the pixels, (N, h, w, D) each; arguments as for :meth:`forward`."""
        assert len(layers) == len(self.blocks), f"{len(layers)} layers for {len(self.blocks)} blocks"
        x = dense.permute(0, 2, 3, 1)
        features = []
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, text, layer)
            features.append(x)
        return features

    def forward(self, dense: Tensor, text: Tensor, layers: Sequence[Tensor]) -> Tensor:
        """
        Args:
            dense: (N, D, h, w) unit vectors, CLIP's embeddings of the positions.
            text: (N, K, D) from :class:`TextAdapter`.
            layers: for each block a map (N, C, h, w) of CLIP's encoder, in the blocks' order.

        Returns:
            Logits (N, K, h, w).
        """
        return pixel_text_products(self.features(dense, text, layers)[-1], text)

    def block_logits(self, dense: Tensor, text: Tensor, layers: Sequence[Tensor]) -> list[Tensor]:
        """Logits (N, K, h, w) after every block, last block last, for deep supervision; see :meth:`forward`."""
        return [pixel_text_products(x, text) for x in self.features(dense, text, layers)]


def pixel_text_products(pixels: Tensor, text: Tensor) -> Tensor:
    """(N, h, w, D) and (N, K, D) -> (N, K, h, w)."""
    return torch.einsum("nhwd,nkd->nkhw", pixels, text)
