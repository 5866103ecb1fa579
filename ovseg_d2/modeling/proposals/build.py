"""The slot for mask generators."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

from ovseg_d2.modeling.clip.clip import Clip

#: Policies: everything trains; the classifier of masks alone; nothing.
TRAINABLE = ("full", "class_head", "frozen")

MASK_PROPOSAL_REGISTRY = Registry("MASK_PROPOSAL")
MASK_PROPOSAL_REGISTRY.__doc__ = """
Mask generators: modules that are made from ``cfg`` and the model's ``Clip`` or None, and map an ``ImageBatch``, its
``ClipFeatures`` and ``TextClasses`` (or None) to ``MaskProposals``.
"""


def build_mask_proposals(cfg: CfgNode, clip: Clip | None = None) -> nn.Module:
    """The generator that ``MODEL.OVSEG.PROPOSALS.NAME`` names.

    Args:
        clip: of the model that the generator is for; it does not become part of the generator.

    Raises:
        ValueError: no such generator, or it cannot be frozen so.
    """
    name = cfg.MODEL.OVSEG.PROPOSALS.NAME
    if name not in MASK_PROPOSAL_REGISTRY:
        known = sorted(known_name for known_name, _ in MASK_PROPOSAL_REGISTRY)
        raise ValueError(f"MODEL.OVSEG.PROPOSALS.NAME: no mask generator {name!r}; known are {', '.join(known)}")
    generator = MASK_PROPOSAL_REGISTRY.get(name)(cfg, clip)
    _apply_policy(generator, cfg.MODEL.OVSEG.PROPOSALS.TRAINABLE)
    return generator


def has_classes(generator: nn.Module) -> bool:
    """Whether a generator classifies its masks."""
    return getattr(getattr(generator, "mask_decoder", None), "class_embed", None) is not None


def _apply_policy(generator: nn.Module, policy: str) -> None:
    """Freeze what ``MODEL.OVSEG.PROPOSALS.TRAINABLE`` says.

    Raises:
        ValueError: no such policy, or a generator without class head.
    """
    key = "MODEL.OVSEG.PROPOSALS.TRAINABLE"
    if policy not in TRAINABLE:
        raise ValueError(f"{key}: got {policy!r}; allowed are {', '.join(TRAINABLE)}")
    if policy == "full":
        return
    generator.requires_grad_(False)
    if policy == "class_head":
        decoder = getattr(generator, "mask_decoder", None)
        if decoder is None:
            raise ValueError(f"{key}: 'class_head', but a {type(generator).__name__} has none; use 'frozen'")
        decoder.class_embed.requires_grad_(True)
