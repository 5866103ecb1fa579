"""Masks from attention weights (SegViT's attention to mask), as ZegCLIP's decoder has them (arXiv 2212.03588)."""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor, nn

from ovseg_d2.modeling.layers.attention import CrossAttention, ResidualFFN, attention_scale


class AttentionToMaskLayer(nn.Module):
    """Texts attend to the pixels, then an MLP, each normalised after the sum; there is no self-attention."""

    def __init__(self, *, dim: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        """``dropout``: of the attention weights, of both updates and of the hidden layer."""
        super().__init__()
        self.attention = CrossAttention(dim=dim, num_heads=num_heads, dropout=dropout, weight_dropout=dropout)
        self.norm = nn.LayerNorm(dim)
        self.ffn = ResidualFFN(dim=dim, ffn_dim=ffn_dim, dropout=dropout)
        for linear in (self.ffn.linear1, self.ffn.linear2):  # the public code keeps torch's initialisation
            linear.reset_parameters()

    def forward(self, queries: Tensor, pixels: Tensor) -> Tensor:
        """(N, K, D) and (N, h * w, D) -> (N, K, D)."""
        return self.ffn(self.norm(queries + self.attention(queries, pixels)))


class MaskAttention(nn.Module):
    """The scaled products of queries and keys before the softmax, averaged over the heads."""

    def __init__(self, *, dim: int, num_heads: int) -> None:
        super().__init__()
        self.scale = attention_scale(dim=dim, num_heads=num_heads) / num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, pixels: Tensor) -> Tensor:
        """(N, K, D) and (N, h * w, D) -> (N, K, h * w)."""
        return self.scale * self.q_proj(queries) @ self.k_proj(pixels).mT


class AttentionToMaskDecoder(nn.Module):
    """ZegCLIP's decoder: class embeddings as queries gather from the pixels, layer by layer; the attention logits of
    the last layer are the class maps.

    What else that layer computes goes nowhere, so it has a :class:`MaskAttention` alone. The public code keeps its
    other weights, and an unused self-attention in every layer.
    """

    def __init__(
        self, *, dim: int, num_layers: int = 3, num_heads: int = 8, ffn_dim: int = 2048, dropout: float = 0.1
    ) -> None:
        """
        Args:
            dim: D, of CLIP's joint space; a multiple of ``num_heads``.
            num_layers: with the one that makes the maps.
            ffn_dim: hidden width of the MLPs.
            dropout: see :class:`AttentionToMaskLayer`.

        Raises:
            ValueError: no layer at all, or heads that do not divide the channels.
        """
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"MODEL.OVSEG.LDVC.HEADS is {num_heads}; expected a divisor of {dim}, CLIP's width")
        if num_layers < 1:
            raise ValueError(f"MODEL.OVSEG.LDVC.ATM_LAYERS is {num_layers}; expected 1 or more layers of the decoder")
        self.mask_attention = MaskAttention(dim=dim, num_heads=num_heads)
        layer = AttentionToMaskLayer(dim=dim, num_heads=num_heads, ffn_dim=ffn_dim, dropout=dropout)
        # The public code's layers are copies of one, so all start alike.
        layer.attention.q_proj.load_state_dict(self.mask_attention.q_proj.state_dict())
        layer.attention.k_proj.load_state_dict(self.mask_attention.k_proj.state_dict())
        self.layers = nn.ModuleList(deepcopy(layer) for _ in range(num_layers - 1))

    def forward(self, dense: Tensor, queries: Tensor) -> Tensor:
        """
        Args:
            dense: (N, D, h, w) unit vectors, CLIP's embeddings of the positions.
            queries: (N, K, D) from :class:`TextAdapter`.

        Returns:
            Logits (N, K, h, w).
        """
        pixels = dense.flatten(2).mT
        for layer in self.layers:
            queries = layer(queries, pixels)
        return self.mask_attention(queries, pixels).unflatten(-1, dense.shape[-2:])
