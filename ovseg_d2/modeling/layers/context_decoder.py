"""Text that looks at an image (DenseCLIP, arXiv 2112.01518, section 3.3): a transformer decoder of class embeddings."""

from __future__ import annotations

from torch import Tensor, nn

from ovseg_d2.modeling.layers.attention import CrossAttention


class _DecoderLayer(nn.Module):
    """Self-attention, cross-attention and MLP, each normalised before and added to its input."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = CrossAttention(dim=dim, num_heads=num_heads, bias=False, dropout=dropout)
        self.cross_attn = CrossAttention(dim=dim, num_heads=num_heads, bias=False, dropout=dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.self_attn(y, y)
        x = x + self.cross_attn(self.norm2(x), memory)
        return x + self.mlp(self.norm3(x))


class ContextDecoder(nn.Module):
    """What an image adds to class embeddings; DenseCLIP adds it times a learned ``gamma``, 1e-4 at first."""

    def __init__(
        self, *, embed_dim: int, dim: int = 256, num_heads: int = 4, num_layers: int = 6, dropout: float = 0.1
    ) -> None:
        """
        Args:
            embed_dim: D, of text and image embeddings.
            dim: width of the decoder.
        """
        super().__init__()
        self.memory_proj = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, dim), nn.LayerNorm(dim))
        self.text_proj = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, dim))
        self.decoder = nn.ModuleList(
            _DecoderLayer(dim=dim, num_heads=num_heads, dropout=dropout) for _ in range(num_layers)
        )
        self.out_proj = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, embed_dim))

    def forward(self, text_embeds: Tensor, image_tokens: Tensor) -> Tensor:
        """
        Args:
            text_embeds: (N, K, D).
            image_tokens: (N, 1 + h * w, D) global embedding and dense features.

        Returns:
            (N, K, D) to be added to ``text_embeds``.
        """
        memory = self.memory_proj(image_tokens)
        x = self.text_proj(text_embeds)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.out_proj(x)
