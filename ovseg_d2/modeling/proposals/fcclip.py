"""FC-CLIP as a source of mask proposals (arXiv 2308.02487, section 3.2): Mask2Former's decoders on a frozen CLIP."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import nn

from ovseg_d2.modeling.clip.build import build_clip
from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.proposals.build import MASK_PROPOSAL_REGISTRY
from ovseg_d2.modeling.proposals.decoders import build_decoders
from ovseg_d2.modeling.proposals.mask_decoder import MaskedAttentionDecoder
from ovseg_d2.modeling.proposals.pixel_decoder import MSDeformAttnPixelDecoder
from ovseg_d2.structures import ClipFeatures, ImageBatch, MaskProposals, TextClasses


@MASK_PROPOSAL_REGISTRY.register()
class FCCLIPProposals(nn.Module):
    """Pixel decoder and masked-attention decoder; the backbone is the image tower of the model's CLIP.

    Or a frozen one of its own, where the model's CLIP is of another kind: a mask generator on a ConvNeXt, whose masks a
    ViT classifies.
    """

    @configurable
    def __init__(
        self,
        *,
        pixel_decoder: MSDeformAttnPixelDecoder,
        mask_decoder: MaskedAttentionDecoder,
        clip: Clip | None = None,
    ) -> None:
        """
        Args:
            clip: without text tower; None for the model's.
        """
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.mask_decoder = mask_decoder
        self.clip = clip.requires_grad_(False).eval() if clip is not None else None

    @property
    def needs_clip_features(self) -> bool:
        """Whether :meth:`forward` needs the features of the model's CLIP."""
        return self.clip is None

    @classmethod
    def from_config(cls, cfg: CfgNode, clip: Clip | None = None) -> dict[str, Any]:
        if clip is None:
            raise ValueError(
                "MODEL.OVSEG.PROPOSALS.NAME: FCCLIPProposals needs a model with CLIP, which MODEL.META_ARCHITECTURE "
                f"{cfg.MODEL.META_ARCHITECTURE} is not; use Mask2FormerProposals"
            )
        key, name, own = "MODEL.OVSEG.CLIP.NAME", cfg.MODEL.OVSEG.CLIP.NAME, None
        if cfg.MODEL.OVSEG.PROPOSALS.CLIP_NAME:
            key, name = "MODEL.OVSEG.PROPOSALS.CLIP_NAME", cfg.MODEL.OVSEG.PROPOSALS.CLIP_NAME
            own = build_clip(name, with_text=False)
        shapes = (own or clip).visual.output_shape()
        return {"clip": own, **build_decoders(cfg, shapes, source=f"the image tower of {key} {name}", clip=clip)}

    def forward(
        self, images: ImageBatch, features: ClipFeatures | None = None, text: TextClasses | None = None
    ) -> MaskProposals:
        """
        Args:
            images: for an image tower of its own.
            features: with the layers ``MODEL.OVSEG.PROPOSALS.IN_FEATURES``; not used with a tower of its own.
            text: embeds (E, 1, D), for a text head.

        Returns:
            Proposals at the pixel decoder's common stride, with class logits (N, Q, K + 1) and ``aux``.
        """
        if self.clip is not None:
            with torch.no_grad():
                features = self.clip.visual(images.tensor, masks_only=True)
        assert features is not None, "FCCLIPProposals needs CLIP's features"
        pixels = self.pixel_decoder(features.layers)
        return self.mask_decoder(pixels.multi_scale, pixels.mask_features, text)
