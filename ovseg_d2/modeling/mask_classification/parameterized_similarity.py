"""MaskCLIP++'s parameterised similarity modelling (arXiv 2412.11464, section 3.2): learned ways to compare masks and
texts that keep the two aligned.

A *similarity* maps embeddings of masks and the texts of any vocabulary to logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.clip.clip import MAX_LOGIT_SCALE
from ovseg_d2.modeling.text_classifier import averaged, class_logits
from ovseg_d2.structures import TextClasses


class CosineSimilarity(nn.Module):
    """CLIP's own: the mean of the scaled cosines with a class's P prompts; without parameters."""

    def __init__(self, *, normalise_text: bool = False) -> None:
        """
        Args:
            normalise_text: for texts that are no unit vectors.
        """
        super().__init__()
        self.normalise_text = normalise_text

    def forward(
        self, mask_embeds: Tensor, text: TextClasses, *, scale: Tensor | float = 1.0, dense: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            mask_embeds: (N, Q, D), of any length.
            text: embeds (E, P, D).
            scale: of the cosines.
            dense: not used.

        Returns:
            (N, Q, K).
        """
        embeds = F.normalize(text.embeds, dim=-1) if self.normalise_text else text.embeds
        entry_logits = scale * F.normalize(mask_embeds, dim=-1) @ embeds.mean(dim=1).T
        return class_logits(entry_logits, text.class_ids, len(text))


class LinearSimilarity(nn.Module):
    """A linear map from the cosines with a class's P prompts to its logit, in two steps without anything between.

    The paper expands one cosine to T values and back; the public code expands those of all templates.
    """

    def __init__(self, *, num_prompts: int, width: int = 768) -> None:
        """
        Args:
            num_prompts: P.
            width: T, of what lies between.
        """
        super().__init__()
        self.expand = nn.Linear(num_prompts, width)
        self.reduce = nn.Linear(width, 1)

    def forward(
        self, mask_embeds: Tensor, text: TextClasses, *, scale: Tensor | float = 1.0, dense: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            mask_embeds: (N, Q, D), of any length.
            text: embeds (E, P, D).
            scale: of the cosines.
            dense: not used.

        Returns:
            (N, Q, K).
        """
        # Both maps are linear, so they are taken together and to the side of the texts: no (N, Q, E, T) tensor.
        weights = (self.reduce.weight @ self.expand.weight)[0]
        bias = self.reduce.weight @ self.expand.bias + self.reduce.bias
        rows = torch.einsum("p,epd->ed", weights, text.embeds)
        entry_logits = scale * F.normalize(mask_embeds, dim=-1) @ rows.T + bias
        return class_logits(entry_logits, text.class_ids, len(text))


class PseudoTextSimilarity(nn.Module):
    """Texts that have seen the image (equation 3): each class gathers what is like it in the image, its pseudo text.

    Masks are compared with the norm of text and pseudo text, whose length takes the temperature's place.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int = 8,
        dropout: float = 0.1,
        normalise_dense: bool = True,
        detach_dense: bool = False,
        learn_scale: bool = False,
        residual: LinearSimilarity | None = None,
    ) -> None:
        """
        Args:
            dim: D.
            dropout: of the attention.
            normalise_dense: whether the positions' embeddings are made unit vectors first.
            detach_dense: whether CLIP learns nothing through them.
            learn_scale: a learned scale for the logits, from 1 / 0.07.
            residual: its logits are added.
        """
        super().__init__()
        self.img_proj = nn.Linear(dim, dim, bias=False)
        self.attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.normalise_dense, self.detach_dense = normalise_dense, detach_dense
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07))) if learn_scale else None
        self.residual = residual

    def forward(
        self, mask_embeds: Tensor, text: TextClasses, *, scale: Tensor | float = 1.0, dense: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            mask_embeds: (N, Q, D), of any length.
            text: embeds (E, P, D); the mean over the prompts is used, but by the residual.
            scale: of the cosines of the residual.
            dense: (N, D, h, w) embeddings of the positions.

        Returns:
            (N, Q, K).
        """
        entry_logits = F.normalize(mask_embeds, dim=-1) @ self.text_rows(text, dense).mT
        if self.logit_scale is not None:
            entry_logits = self.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE) * entry_logits
        logits = class_logits(entry_logits, text.class_ids, len(text))
        return logits if self.residual is None else logits + self.residual(mask_embeds, text, scale=scale)

    def text_rows(self, text: TextClasses, dense: Tensor | None) -> Tensor:
        """(N, E, D) the rows that masks are compared with, not normalised."""
        rows = averaged(text).embeds[:, 0]
        return self.norm(rows + self.pseudo_text(rows, dense))

    def pseudo_text(self, rows: Tensor, dense: Tensor | None) -> Tensor:
        """P_t: rows (E, D) and the image's embeddings (N, D, h, w) -> (N, E, D)."""
        assert dense is not None, "PseudoTextSimilarity needs dense embeddings"
        positions = dense.flatten(2).transpose(1, 2)
        if self.detach_dense:
            positions = positions.detach()
        if self.normalise_dense:
            positions = F.normalize(positions, dim=-1)
        values = self.img_proj(positions)
        return self.attn(rows.expand(len(values), -1, -1), values, values, need_weights=False)[0]
