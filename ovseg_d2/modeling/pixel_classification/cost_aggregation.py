"""Cost aggregation of CAT-Seg (arXiv 2303.11797) and FGA-seg (arXiv 2501.00877, section III-C.3).

A cost volume holds a feature map for every class of every image, one row each (:class:`ClassRows`), channels last.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.pixel_classification.class_rows import ClassRows, in_chunks
from ovseg_d2.modeling.pixel_classification.guided_attention import ClassAttention, TwoLinears
from ovseg_d2.modeling.pixel_classification.spatial_aggregation import SpatialAggregation

FUSIONS = ("cat", "add")


class Fusion(nn.Module):
    """Two maps as one: a linear layer over both ("cat") or their sum ("add") (table V)."""

    def __init__(self, *, dim: int, mode: str) -> None:
        """
        Args:
            dim: C, of both maps and of the result.
            mode: "cat" or "add".

        Raises:
            ValueError: another mode.
        """
        super().__init__()
        if mode not in FUSIONS:
            raise ValueError(f"MODEL.OVSEG.FGA_SEG.FUSION is {mode!r}; expected one of {list(FUSIONS)}")
        self.linear = nn.Linear(2 * dim, dim) if mode == "cat" else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., C) and (..., C) -> (..., C)."""
        if self.linear is None:
            return x + y
        return self.linear(torch.cat([x, y], dim=-1))


class CostEmbedding(nn.Module):
    """Features of the similarities of pixels and texts, class by class."""

    def __init__(
        self,
        *,
        dim: int,
        num_prompts: int = 1,
        fusion: str | None = "cat",
        kernel_size: int = 7,
        chunk_size: int = 64,
    ) -> None:
        """
        Args:
            dim: C, of the features.
            num_prompts: P, of the global similarity.
            fusion: of global and local features, see :class:`Fusion`; None: there is no local similarity (CAT-Seg).
            kernel_size: side of the convolutions, odd.
            chunk_size: rows that are computed at a time where no gradient is wanted.
        """
        super().__init__()
        padding = kernel_size // 2
        self.chunk_size = chunk_size
        self.global_conv = nn.Conv2d(num_prompts, dim, kernel_size, padding=padding)
        self.local_conv = None if fusion is None else nn.Conv2d(1, dim, kernel_size, padding=padding)
        self.fusion = None if fusion is None else Fusion(dim=dim, mode=fusion)

    def forward(
        self, rows: ClassRows, global_similarity: Tensor, local_similarity: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            rows: whose similarities these are.
            global_similarity: (R, P, h, w).
            local_similarity: (R, h, w).

        Returns:
            Fused features (R, h, w, C) and those of the local similarity alone, None without.
        """
        if self.local_conv is None:
            return in_chunks(self._global_features, rows, global_similarity, size=self.chunk_size), None
        return in_chunks(self._features, rows, global_similarity, local_similarity, size=self.chunk_size)

    def _global_features(self, _rows: ClassRows, similarity: Tensor) -> Tensor:
        return self.global_conv(similarity).permute(0, 2, 3, 1)

    def _features(self, rows: ClassRows, global_similarity: Tensor, local_similarity: Tensor) -> tuple[Tensor, Tensor]:
        local = self.local_conv(local_similarity[:, None]).permute(0, 2, 3, 1)
        return self.fusion(self._global_features(rows, global_similarity), local), local


class ClassAggregation(nn.Module):
    """Attention between the classes of an image, at every position of the pooled maps.

    Shorter vocabularies are filled up to ``pad_length`` with copies of one learned class. As they are all the same,
    one is computed and counted so many times.
    """

    def __init__(
        self, *, dim: int, guidance_dim: int, num_heads: int, attention: str, pooling: int, pad_length: int
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.pad_length = pad_length
        self.norm1 = nn.LayerNorm(dim)
        self.attention = ClassAttention(dim=dim, guidance_dim=guidance_dim, num_heads=num_heads, kind=attention)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = TwoLinears(dim=dim, hidden_dim=4 * dim, activation=F.relu)
        self.pad_token = nn.Parameter(torch.zeros(1, 1, dim)) if pad_length else None
        self.pad_guidance = nn.Parameter(torch.zeros(1, 1, guidance_dim)) if pad_length else None

    def forward(self, rows: ClassRows, x: Tensor, guidance: Tensor, *, chunk_size: int) -> Tensor:
        """
        Args:
            rows: whose maps these are.
            x: (R, h, w, C).
            guidance: (R, G), of the classes' texts.
            chunk_size: see :func:`in_chunks`.

        Returns:
            (R, h, w, C).
        """
        pooled = _average_pool(x, self.pooling)
        pad = None
        if self.pad_token is not None:
            counts = (self.pad_length - rows.counts()).clamp(min=0)
            pad = (self.norm1(self.pad_token[0, 0]), self.pad_guidance[0, 0], counts)
        pooled = pooled + self.attention(rows, self.norm1(pooled), guidance, pad)

        def finish(_rows: ClassRows, x: Tensor, pooled: Tensor) -> Tensor:
            pooled = pooled + self.mlp(self.norm2(pooled))
            return x + _resize(pooled, (x.shape[1], x.shape[2]))

        return in_chunks(finish, rows, x, pooled, size=chunk_size)


class CostAggregationLayer(nn.Module):
    """Spatial aggregation, then class aggregation."""

    def __init__(
        self,
        *,
        dim: int,
        image_guidance_dim: int,
        text_guidance_dim: int,
        num_heads: int = 4,
        window_size: int = 12,
        pooling: int = 2,
        attention: str = "linear",
        pad_length: int = 256,
        chunk_size: int = 64,
    ) -> None:
        """
        Args:
            dim: C, of the cost volume.
            image_guidance_dim, text_guidance_dim: G, of the projected features of images and texts.
            num_heads: of both attentions.
            window_size: side of the spatial attention's windows.
            pooling: by what factor maps shrink before the class attention.
            attention: of classes, "linear" or "full" (softmax).
            pad_length: to how many classes a vocabulary is filled up; 0: not at all.
            chunk_size: rows that are computed at a time where no gradient is wanted.
        """
        super().__init__()
        self.chunk_size = chunk_size
        self.spatial = SpatialAggregation(
            dim=dim, guidance_dim=image_guidance_dim, num_heads=num_heads, window_size=window_size
        )
        self.classes = ClassAggregation(
            dim=dim,
            guidance_dim=text_guidance_dim,
            num_heads=num_heads,
            attention=attention,
            pooling=pooling,
            pad_length=pad_length,
        )

    def forward(self, rows: ClassRows, x: Tensor, image_guidance: Tensor, text_guidance: Tensor) -> Tensor:
        """Maps (R, h, w, C), the images' features (N, h, w, G) and the texts' (R, G') -> (R, h, w, C)."""

        def spatial(rows: ClassRows, x: Tensor) -> Tensor:
            return self.spatial(rows, x, image_guidance)

        x = in_chunks(spatial, rows, x, size=self.chunk_size)
        return self.classes(rows, x, text_guidance, chunk_size=self.chunk_size)


class CostAggregation(nn.Module):
    """Layers of aggregation, guided by projections of the images' and the texts' features."""

    def __init__(
        self,
        *,
        num_layers: int = 2,
        image_dim: int,
        text_dim: int,
        image_guidance_dim: int,
        text_guidance_dim: int,
        **layer: int | str,
    ) -> None:
        """
        Args:
            num_layers: of :class:`CostAggregationLayer`.
            image_dim, text_dim: D, of the dense features and of the texts.
            image_guidance_dim, text_guidance_dim: to which they are projected.
            layer: see :class:`CostAggregationLayer`.
        """
        super().__init__()
        self.image_guidance = nn.Conv2d(image_dim, image_guidance_dim, 3, padding=1)
        self.text_guidance = nn.Linear(text_dim, text_guidance_dim)
        self.layers = nn.ModuleList(
            CostAggregationLayer(image_guidance_dim=image_guidance_dim, text_guidance_dim=text_guidance_dim, **layer)
            for _ in range(num_layers)
        )

    def forward(self, rows: ClassRows, x: Tensor, dense: Tensor, text: Tensor) -> Tensor:
        """
        Args:
            rows: whose maps these are.
            x: (R, h, w, C).
            dense: (N, D, h, w) CLIP's features of the positions.
            text: (R, P, D), of any length; a class's prompts count alike.

        Returns:
            (R, h, w, C).
        """
        image_guidance = F.relu(self.image_guidance(dense)).permute(0, 2, 3, 1)
        text = F.normalize(F.normalize(text, dim=-1).mean(dim=1), dim=-1)
        text_guidance = F.relu(self.text_guidance(text))
        for layer in self.layers:
            x = layer(rows, x, image_guidance, text_guidance)
        return x


def _average_pool(x: Tensor, size: int) -> Tensor:
    """(R, h, w, C) -> (R, h // size, w // size, C), at least one position."""
    kernel = tuple(min(size, length) for length in x.shape[1:3])
    return x if kernel == (1, 1) else F.avg_pool2d(x.permute(0, 3, 1, 2), kernel).permute(0, 2, 3, 1)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(R, h, w, C) -> (R, *size, C), corners aligned, as the public code has it."""
    if (x.shape[1], x.shape[2]) == size:
        return x
    x = F.interpolate(x.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=True)
    return x.permute(0, 2, 3, 1)
