"""The cost head that a configuration describes."""

from __future__ import annotations

from detectron2.config import CfgNode

from ovseg_d2.modeling.pixel_classification.cost_aggregation import CostAggregation, CostEmbedding
from ovseg_d2.modeling.pixel_classification.cost_decoder import CostDecoder
from ovseg_d2.modeling.pixel_classification.cost_head import CostHead
from ovseg_d2.modeling.pixel_classification.pixel_text_alignment import GlobalLocalSimilarity


def build_cost_head(cfg: CfgNode, *, dim: int, num_prompts: int, local_similarity: bool, fast: bool) -> CostHead:
    """What ``MODEL.OVSEG.FGA_SEG`` says.

    Args:
        dim: D, of CLIP's joint space.
        num_prompts: P, texts a class.
        local_similarity: beside the cosine; CAT-Seg has none.
        fast: with auxiliary heads, which rule classes out in evaluation.

    Raises:
        ValueError: values that are not allowed, or do not go with each other.
    """
    options = cfg.MODEL.OVSEG.FGA_SEG
    fusion = options.FUSION if local_similarity else None
    return CostHead(
        similarity=GlobalLocalSimilarity(
            dim=dim,
            kernel_size=options.KERNEL_SIZE if local_similarity else None,
            normalise_kernels=options.NORMALISE_KERNELS,
        ),
        embedding=CostEmbedding(dim=options.HIDDEN_DIM, num_prompts=num_prompts, fusion=fusion),
        aggregation=CostAggregation(
            num_layers=options.LAYERS,
            image_dim=dim,
            text_dim=dim,
            image_guidance_dim=options.GUIDANCE_DIM,
            text_guidance_dim=options.TEXT_GUIDANCE_DIM,
            dim=options.HIDDEN_DIM,
            num_heads=options.HEADS,
            window_size=options.WINDOW_SIZE,
            pooling=options.POOLING,
            attention=options.CLASS_ATTENTION,
            pad_length=options.PAD_CLASSES,
        ),
        decoder=CostDecoder(
            dim=options.HIDDEN_DIM,
            dims=options.DECODER_DIMS,
            feature_dims=options.DECODER_GUIDANCE_DIMS,
            guidance_dims=options.DECODER_GUIDANCE_PROJ_DIMS,
            fusion=fusion,
            aux_heads=fast,
        ),
        max_classes=options.MAX_CLASSES,
        top_k=options.TOP_K if fast else 0,
    )
