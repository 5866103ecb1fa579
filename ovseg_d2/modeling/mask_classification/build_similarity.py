"""MaskCLIP++'s similarities by name."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from torch import nn

from ovseg_d2.modeling.mask_classification.misaligned_similarity import LinearEmbedSimilarity, PseudoTextAlone
from ovseg_d2.modeling.mask_classification.parameterized_similarity import (
    CosineSimilarity,
    LinearSimilarity,
    PseudoTextSimilarity,
)

SIMILARITIES = ("cosine", "linear", "pseudo_text", "mask_linear", "text_linear", "pseudo_text_alone")


def build_similarity(cfg: CfgNode, *, dim: int, num_prompts: int) -> nn.Module:
    """The similarity that ``MODEL.OVSEG.MASKCLIPPP.SIMILARITY`` names.

    Args:
        dim: D.
        num_prompts: P, templates a class.

    Raises:
        ValueError: no such similarity, or its heads cannot share the ``dim`` channels.
    """
    options = cfg.MODEL.OVSEG.MASKCLIPPP
    name = options.SIMILARITY
    if name not in SIMILARITIES:
        raise ValueError(f"MODEL.OVSEG.MASKCLIPPP.SIMILARITY is {name!r}; allowed are {', '.join(SIMILARITIES)}")
    if name == "cosine":
        return CosineSimilarity()
    if name in ("mask_linear", "text_linear"):
        return LinearEmbedSimilarity(dim=dim, side=name.removesuffix("_linear"))
    if name == "linear":
        return LinearSimilarity(num_prompts=num_prompts, width=options.WIDTH)
    kind = PseudoTextSimilarity if name == "pseudo_text" else PseudoTextAlone
    return kind(dim=dim, **_pseudo_text_options(cfg, dim=dim, num_prompts=num_prompts))


def _pseudo_text_options(cfg: CfgNode, *, dim: int, num_prompts: int) -> dict[str, Any]:
    options = cfg.MODEL.OVSEG.MASKCLIPPP
    pseudo = options.PSEUDO_TEXT
    if pseudo.HEADS < 1 or dim % pseudo.HEADS:
        raise ValueError(
            f"MODEL.OVSEG.MASKCLIPPP.PSEUDO_TEXT.HEADS: got {pseudo.HEADS}; expected a divisor of CLIP's {dim} "
            "dimensions"
        )
    residual = LinearSimilarity(num_prompts=num_prompts, width=options.WIDTH) if pseudo.RESIDUAL else None
    return {
        "num_heads": pseudo.HEADS,
        "dropout": pseudo.DROPOUT,
        "normalise_dense": pseudo.NORMALISE,
        "detach_dense": pseudo.DETACH,
        "learn_scale": pseudo.LEARN_SCALE,
        "residual": residual,
    }
