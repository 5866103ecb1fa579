"""Similarities that MaskCLIP++ rejects (arXiv 2412.11464, Table 1): they can lower the loss by changing one side of
CLIP's aligned embeddings, and so unlearn what CLIP knows of classes that training does not show."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.mask_classification.parameterized_similarity import CosineSimilarity, PseudoTextSimilarity
from ovseg_d2.structures import TextClasses

SIDES = ("mask", "text")


class LinearEmbedSimilarity(nn.Module):
    """<Linear(E_m), E_t> or <E_m, Linear(E_t)>: cosines after a linear map of the embeddings of one side."""

    def __init__(self, *, dim: int, side: str) -> None:
        """
        Args:
            dim: D.
            side: "mask" or "text".
        """
        super().__init__()
        assert side in SIDES, side
        self.side = side
        self.linear = nn.Linear(dim, dim)
        self.cosine = CosineSimilarity(normalise_text=True)

    def forward(
        self, mask_embeds: Tensor, text: TextClasses, *, scale: Tensor | float = 1.0, dense: Tensor | None = None
    ) -> Tensor:
        """As in :class:`CosineSimilarity`."""
        if self.side == "mask":
            mask_embeds = self.linear(mask_embeds)
        else:
            text = replace(text, embeds=self.linear(text.embeds))
        return self.cosine(mask_embeds, text, scale=scale)


class PseudoTextAlone(PseudoTextSimilarity):
    """<E_m, Norm(P_t)>: equation 3 without the texts themselves, whose initial similarities are anything."""

    def text_rows(self, text: TextClasses, dense: Tensor | None) -> Tensor:
        return self.norm(self.pseudo_text(F.normalize(text.embeds.mean(dim=1), dim=-1), dense))
