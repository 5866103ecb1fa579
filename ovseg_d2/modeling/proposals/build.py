"""The slot for mask generators."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

MASK_PROPOSAL_REGISTRY = Registry("MASK_PROPOSAL")
MASK_PROPOSAL_REGISTRY.__doc__ = """
Mask generators: modules that are made from ``cfg`` and map an ``ImageBatch`` to ``MaskProposals``.
"""


def build_mask_proposals(cfg: CfgNode) -> nn.Module:
    """The generator that ``MODEL.OVSEG.PROPOSALS.NAME`` names.

    Raises:
        ValueError: no such generator.
    """
    name = cfg.MODEL.OVSEG.PROPOSALS.NAME
    if name not in MASK_PROPOSAL_REGISTRY:
        known = sorted(known_name for known_name, _ in MASK_PROPOSAL_REGISTRY)
        raise ValueError(f"MODEL.OVSEG.PROPOSALS.NAME: no mask generator {name!r}; known are {', '.join(known)}")
    return MASK_PROPOSAL_REGISTRY.get(name)(cfg)
