"""Masks that come with the images, out of files (written by ``tools/export_proposals.py``)."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from torch import nn

from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.proposals.binary_masks import binary_proposals
from ovseg_d2.modeling.proposals.build import MASK_PROPOSAL_REGISTRY
from ovseg_d2.structures import ClipFeatures, ImageBatch, MaskProposals, TextClasses


@MASK_PROPOSAL_REGISTRY.register()
class PrecomputedProposals(nn.Module):
    """The generator that computes nothing: the data mapper reads the masks and augments them with the image."""

    @configurable
    def __init__(self, *, residual_mask: bool = True, source: str = "MODEL.OVSEG.PROPOSALS.FILES") -> None:
        """
        Args:
            residual_mask: what no mask of an image covers is one more mask, so that every pixel gets a class.
            source: where the masks should have come from, for errors.
        """
        super().__init__()
        self.residual_mask = residual_mask
        self.source = source

    @classmethod
    def from_config(cls, cfg: CfgNode, clip: Clip | None = None) -> dict[str, Any]:
        prop = cfg.MODEL.OVSEG.PROPOSALS
        return {
            "residual_mask": prop.RESIDUAL_MASK,
            "source": f"MODEL.OVSEG.PROPOSALS.FILES {prop.FILES!r}",
        }

    def forward(
        self, images: ImageBatch, features: ClipFeatures | None = None, text: TextClasses | None = None
    ) -> MaskProposals:
        """The masks of ``images`` as certain logits (N, Q, H, W); empty ones (cut off by a crop) are not valid.

        Raises:
            ValueError: no masks came with the images.
        """
        if images.proposal_masks is None:
            raise ValueError(
                f"{type(self).__name__}: no masks came with image {images.image_ids[0]!r}; they are read from "
                f"{self.source} for the images of registered datasets"
            )
        return binary_proposals(images.proposal_masks, images, residual_mask=self.residual_mask)
