"""What the configuration of :class:`MaskCLIPpp` means for its parts."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from torch import nn

from ovseg_d2.modeling.clip.architectures import tower_kind


def similarity_context(cfg: CfgNode) -> str:
    """What the similarity wants to see of the image.

    Raises:
        ValueError: ``PSEUDO_TEXT.FROM`` is nothing that there is.
    """
    options = cfg.MODEL.OVSEG.MASKCLIPPP
    if options.PSEUDO_TEXT.FROM not in ("dense", "image"):
        raise ValueError(
            f"MODEL.OVSEG.MASKCLIPPP.PSEUDO_TEXT.FROM is {options.PSEUDO_TEXT.FROM!r}; allowed are dense, image"
        )
    return options.PSEUDO_TEXT.FROM if options.SIMILARITY.startswith("pseudo_text") else "none"


def scales_cosines(cfg: CfgNode) -> bool:
    """Whether the similarity gets CLIP's scale."""
    options = cfg.MODEL.OVSEG.MASKCLIPPP
    # What is but a cosine in the end has no other temperature.
    return options.USE_LOGIT_SCALE or options.SIMILARITY in ("cosine", "mask_linear", "text_linear")


def require_untuned_features(cfg: CfgNode, generator: nn.Module) -> None:
    """
    Raises:
        ValueError: the generator sees the features of a CLIP that is tuned, as no generator was trained on.
    """
    policy = cfg.MODEL.OVSEG.CLIP.TRAINABLE
    if getattr(generator, "needs_clip_features", False) and policy != "frozen":
        raise ValueError(
            f"MODEL.OVSEG.PROPOSALS.CLIP_NAME is '', but MODEL.OVSEG.CLIP.TRAINABLE {policy!r} tunes the model's CLIP, "
            f"whose features the {type(generator).__name__} would get; expected the CLIP that it was trained on"
        )


def visual_options(cfg: CfgNode) -> dict[str, Any]:
    """What the image encoder computes, in the words of the tower that ``MODEL.OVSEG.CLIP.NAME`` has."""
    options = cfg.MODEL.OVSEG.MASKCLIPPP
    kind = tower_kind(cfg.MODEL.OVSEG.CLIP.NAME)
    dense = similarity_context(cfg) == "dense" or options.PRIOR == "pixels"
    if kind == "convnext":
        return {"mask_pooling": "soft", "dense": dense}
    attention = {
        "mask_logit_scale": options.LOG_ALPHA,
        "learn_mask_logit_scale": options.LEARN_ALPHA,
        "pos_mode": "bicubic",
        "pos_align_corners": True,
    }
    if kind == "resnet":
        return {"mask_pooling": "soft", "dense": "value" if dense else "none", **attention}
    return {
        "mask_mode": "maskclippp",
        "start_layer": options.START_LAYER,
        "last_block": "value" if dense else "none",
        **attention,
    }
