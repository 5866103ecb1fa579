"""Perfect masks: those of the annotation (MaskCLIP++, arXiv 2412.11464, trains and measures accuracy on them)."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable

from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.proposals.build import MASK_PROPOSAL_REGISTRY
from ovseg_d2.modeling.proposals.precomputed import PrecomputedProposals


@MASK_PROPOSAL_REGISTRY.register()
class GroundTruthProposals(PrecomputedProposals):
    """In evaluation the data mapper gives every image the masks of its annotation, and nothing for what they leave
    over; in training the targets are the masks."""

    @configurable
    def __init__(self) -> None:
        super().__init__(residual_mask=False, source="the annotation")

    @classmethod
    def from_config(cls, cfg: CfgNode, clip: Clip | None = None) -> dict[str, Any]:
        return {}
