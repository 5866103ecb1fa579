"""Masks that come with the images, out of files (written by ``tools/export_proposals.py``)."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.proposals.build import MASK_PROPOSAL_REGISTRY
from ovseg_d2.structures import ClipFeatures, ImageBatch, MaskProposals, TextClasses

#: Binary masks as logits: a sigmoid of it is 1 in float32, and a sum of some is still finite in float16.
CERTAIN = 50.0


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
                f"PrecomputedProposals: no masks came with image {images.image_ids[0]!r}; they are read from "
                f"{self.source} for the images of registered datasets"
            )
        masks = [
            self._with_residual(masks, size)
            for masks, size in zip(images.proposal_masks, images.image_sizes, strict=True)
        ]
        # At least one row: an image without any mask has one that is not valid.
        most = max(1, *(len(m) for m in masks))
        padded = torch.stack([torch.cat([m, m.new_zeros(most - len(m), *m.shape[1:])]) for m in masks])
        logits = torch.where(padded, CERTAIN, -CERTAIN).to(images.tensor.dtype)
        return MaskProposals(mask_logits=logits, valid=padded.flatten(2).any(dim=2))

    def _with_residual(self, masks: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Masks (Q, H, W) of an image, and the one of what they leave over."""
        if not self.residual_mask:
            return masks
        rest = ~masks.any(dim=0)
        rest[image_size[0] :] = False
        rest[:, image_size[1] :] = False
        return torch.cat([masks, rest[None]])
