"""The ways of MTA-CLIP between CLIP's space and that of the decoder's queries (section 3.2, equations 1 and 5)."""

from __future__ import annotations

from torch import Tensor, nn

from ovseg_d2.modeling.layers.attention import MLP

#: Of all three MLPs; the paper says "MLP" alone.
NUM_LAYERS = 2


class TextQueries(nn.Module):
    """t-hat: CLIP's texts as queries (equation 1)."""

    def __init__(self, *, embed_dim: int, dim: int, norm: bool = False) -> None:
        """
        Args:
            embed_dim: D, of the texts.
            dim: of the queries.
            norm: whether a layer norm comes first, as in DenseCLIP.
        """
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()
        self.mlp = MLP(in_dim=embed_dim, hidden_dim=dim, out_dim=dim, num_layers=NUM_LAYERS)

    def forward(self, text_embeds: Tensor) -> Tensor:
        """(..., D) -> (..., C)."""
        return self.mlp(self.norm(text_embeds))


class MaskTextProjection(nn.Module):
    """t' and m': what a decoder layer has made of texts and masks, in CLIP's space (equation 5)."""

    def __init__(self, *, dim: int, embed_dim: int) -> None:
        super().__init__()
        widths = {"in_dim": dim, "hidden_dim": dim, "out_dim": embed_dim, "num_layers": NUM_LAYERS}
        self.mask_mlp = MLP(**widths)
        self.text_mlp = MLP(**widths)

    def forward(self, mask_queries: Tensor, text_queries: Tensor, text_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            mask_queries: (N, Q, C).
            text_queries: (N, P * K, C), context after context.
            text_embeds: (P, K, D), t^0.

        Returns:
            m' (N, Q, D) and t' (N, P, K, D).
        """
        texts = self.text_mlp(text_queries).unflatten(1, text_embeds.shape[:2]) + text_embeds
        return self.mask_mlp(mask_queries), texts
