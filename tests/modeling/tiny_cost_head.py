"""A small cost head with random weights, and inputs for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ovseg_d2.modeling.pixel_classification.cost_aggregation import CostAggregation, CostEmbedding
from ovseg_d2.modeling.pixel_classification.cost_decoder import CostDecoder
from ovseg_d2.modeling.pixel_classification.cost_head import CostHead
from ovseg_d2.modeling.pixel_classification.pixel_text_alignment import GlobalLocalSimilarity
from tests.helpers import randomise

DIM, CLIP_DIM, FEATURE_DIMS = 32, 12, (6, 5)


def tiny_cost_head(
    *,
    fusion: str | None = "cat",
    aux_heads: bool = True,
    max_classes: int = 64,
    top_k: int = 0,
    num_prompts: int = 1,
    **layer: Any,
) -> CostHead:
    """``layer``: of the aggregation, whose windows are 3 x 3 and whose classes are filled up to 8 by default."""
    head = CostHead(
        similarity=GlobalLocalSimilarity(dim=CLIP_DIM, kernel_size=None if fusion is None else 3),
        embedding=CostEmbedding(dim=DIM, num_prompts=num_prompts, fusion=fusion),
        aggregation=CostAggregation(
            num_layers=2,
            image_dim=CLIP_DIM,
            text_dim=CLIP_DIM,
            image_guidance_dim=9,
            text_guidance_dim=7,
            dim=DIM,
            **{"window_size": 3, "pad_length": 8, **layer},
        ),
        decoder=CostDecoder(
            dim=DIM,
            dims=(16, 16),
            feature_dims=FEATURE_DIMS,
            guidance_dims=(8, 4),
            fusion=fusion,
            aux_heads=aux_heads,
        ),
        max_classes=max_classes,
        top_k=top_k,
    )
    return randomise(head).eval()


def random_cost_input(
    num_images: int, num_classes: int, size: tuple[int, int] = (5, 7), *, num_prompts: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Dense features (N, D, h, w), texts (N, E, P, D) and the two maps that guide the decoder."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    h, w = size
    features = [normal(num_images, FEATURE_DIMS[i], f * h, f * w) for i, f in enumerate((2, 4))]
    return normal(num_images, CLIP_DIM, h, w), normal(num_images, num_classes, num_prompts, CLIP_DIM), features
