"""Classifiers of a mask decoder's queries: a module each, used for every prediction.

Each is called with the queries, their masks, the per-pixel features and the classes, and takes what it needs.
"""

from __future__ import annotations

import math

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.clip.clip import MAX_LOGIT_SCALE, Clip
from ovseg_d2.modeling.layers.attention import MLP
from ovseg_d2.modeling.layers.mask_pooling import pool_binary
from ovseg_d2.modeling.mask_classification.similarity import cosine_logits
from ovseg_d2.structures import TextClasses

CLASS_HEADS = ("linear", "text", "embed", "none")


class LinearClassHead(nn.Linear):
    """Mask2Former's: a linear layer for a fixed number of classes."""

    def __init__(self, *, dim: int, num_classes: int) -> None:
        """
        Args:
            num_classes: K, without "no object".
        """
        super().__init__(dim, num_classes + 1)

    def forward(self, queries: Tensor, mask_logits: Tensor, mask_features: Tensor, text: TextClasses | None) -> Tensor:
        """queries: (N, Q, C) -> (N, Q, K + 1); the rest is not used."""
        return super().forward(queries)


class TextClassHead(nn.Module):
    """FC-CLIP's in-vocabulary classifier (arXiv 2308.02487, section 3.3): a query together with the mean of the pixel
    features in its mask, against the texts of any vocabulary and a learned row for "no object"."""

    def __init__(self, *, dim: int, mask_dim: int, embed_dim: int) -> None:
        """
        Args:
            dim: of the queries.
            mask_dim: of the per-pixel features.
            embed_dim: D, of the texts.
        """
        super().__init__()
        self.pool_norm = nn.LayerNorm(mask_dim)
        self.pool_proj = nn.Linear(mask_dim, dim)
        self.mlp = MLP(in_dim=dim, hidden_dim=dim, out_dim=embed_dim, num_layers=3)
        self.void_embedding = nn.Embedding(1, embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def void_row(self) -> Tensor:
        """(1, D) what stands for "no object" beside the texts."""
        return F.normalize(self.void_embedding.weight, dim=-1)

    def forward(self, queries: Tensor, mask_logits: Tensor, mask_features: Tensor, text: TextClasses | None) -> Tensor:
        """
        Args:
            queries: (N, Q, C).
            mask_logits: (N, Q, h, w), without gradient.
            mask_features: (N, C', h, w).
            text: embeds (E, 1, D).

        Returns:
            (N, Q, K + 1).
        """
        assert text is not None, "a TextClassHead needs classes"
        pooled = self.pool_proj(self.pool_norm(pool_binary(mask_features, mask_logits)))
        scale = self.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
        return cosine_logits(self.mlp(pooled + queries), text, scale, void_embed=self.void_embedding.weight)


class EmbedClassHead(nn.Module):
    """A query's embedding in CLIP's space against the texts of any vocabulary and a learned row for "no object"
    (ZegFormer, arXiv 2112.07910, equation 2; ZSSeg, arXiv 2112.14757, section 3.2; FreeSeg, arXiv 2303.17225)."""

    def __init__(
        self,
        *,
        dim: int,
        embed_dim: int,
        num_layers: int,
        hidden_dim: int,
        temperature: float,
        learn_temperature: bool,
        void_normalised: bool,
    ) -> None:
        """
        Args:
            dim: of the queries.
            embed_dim: D, of the texts.
            num_layers, hidden_dim: of the MLP; one layer is a linear map.
            temperature: cosines are divided by it.
            learn_temperature: its logarithm is trained from there.
            void_normalised: whether the row of "no object" is compared by its direction alone.
        """
        super().__init__()
        self.mlp = MLP(in_dim=dim, hidden_dim=hidden_dim, out_dim=embed_dim, num_layers=num_layers)
        self.void_embedding = nn.Embedding(1, embed_dim)
        self.void_normalised = void_normalised
        # About as long as a text's embedding.
        nn.init.normal_(self.void_embedding.weight, std=embed_dim**-0.5)
        scale = torch.tensor([math.log(1 / temperature)])
        if learn_temperature:
            self.logit_scale = nn.Parameter(scale)
        else:
            self.register_buffer("logit_scale", scale, persistent=False)

    def void_row(self) -> Tensor:
        """(1, D) what stands for "no object" beside the texts."""
        row = self.void_embedding.weight
        return F.normalize(row, dim=-1) if self.void_normalised else row

    def forward(self, queries: Tensor, mask_logits: Tensor, mask_features: Tensor, text: TextClasses | None) -> Tensor:
        """
        Args:
            queries: (N, Q, C).
            mask_logits, mask_features: not used.
            text: embeds (E, 1, D).

        Returns:
            (N, Q, K + 1).
        """
        assert text is not None, "an EmbedClassHead needs classes"
        return cosine_logits(
            self.mlp(queries),
            text,
            self.logit_scale.exp(),
            void_embed=self.void_embedding.weight,
            normalise_void=self.void_normalised,
        )


def build_class_head(cfg: CfgNode, clip: Clip | None) -> nn.Module | None:
    """The head that ``MODEL.OVSEG.PROPOSALS.CLASS_HEAD`` names; None for "none".

    Args:
        clip: of the model; None for models without, which cannot have "text" or "embed".

    Raises:
        ValueError: no such head, no CLIP for it, or a key of it that makes no sense.
    """
    prop = cfg.MODEL.OVSEG.PROPOSALS
    if prop.CLASS_HEAD not in CLASS_HEADS:
        raise ValueError(
            f"MODEL.OVSEG.PROPOSALS.CLASS_HEAD: got {prop.CLASS_HEAD!r}; allowed are {', '.join(CLASS_HEADS)}"
        )
    if prop.CLASS_HEAD == "none":
        return None
    if prop.CLASS_HEAD == "linear":
        return LinearClassHead(dim=prop.HIDDEN_DIM, num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    if clip is None:
        raise ValueError(
            f"MODEL.OVSEG.PROPOSALS.CLASS_HEAD: {prop.CLASS_HEAD!r} needs a model with CLIP, which "
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} is not; use 'linear'"
        )
    if prop.CLASS_HEAD == "text":
        return TextClassHead(dim=prop.HIDDEN_DIM, mask_dim=prop.MASK_DIM, embed_dim=clip.embed_dim)
    if prop.EMBED_LAYERS < 1:
        raise ValueError(f"MODEL.OVSEG.PROPOSALS.EMBED_LAYERS: got {prop.EMBED_LAYERS}; expected at least 1")
    if prop.TEMPERATURE <= 0:
        raise ValueError(f"MODEL.OVSEG.PROPOSALS.TEMPERATURE: got {prop.TEMPERATURE}; expected a positive number")
    return EmbedClassHead(
        dim=prop.HIDDEN_DIM,
        embed_dim=clip.embed_dim,
        num_layers=prop.EMBED_LAYERS,
        hidden_dim=prop.EMBED_HIDDEN_DIM,
        temperature=prop.TEMPERATURE,
        learn_temperature=prop.LEARN_TEMPERATURE,
        void_normalised=prop.VOID_NORMALISED,
    )
