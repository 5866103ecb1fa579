"""FC-CLIP as a source of mask proposals (arXiv 2308.02487, section 3.2): Mask2Former's decoders on a frozen CLIP."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from torch import nn

from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.proposals.build import MASK_PROPOSAL_REGISTRY
from ovseg_d2.modeling.proposals.decoders import build_decoders
from ovseg_d2.modeling.proposals.mask_decoder import MaskedAttentionDecoder
from ovseg_d2.modeling.proposals.pixel_decoder import MSDeformAttnPixelDecoder
from ovseg_d2.structures import ClipFeatures, ImageBatch, MaskProposals, TextClasses


@MASK_PROPOSAL_REGISTRY.register()
class FCCLIPProposals(nn.Module):
    """Pixel decoder and masked-attention decoder; the backbone is the image tower of the model's CLIP."""

    @configurable
    def __init__(self, *, pixel_decoder: MSDeformAttnPixelDecoder, mask_decoder: MaskedAttentionDecoder) -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.mask_decoder = mask_decoder

    @classmethod
    def from_config(cls, cfg: CfgNode, clip: Clip | None = None) -> dict[str, Any]:
        if clip is None:
            raise ValueError(
                "MODEL.OVSEG.PROPOSALS.NAME: FCCLIPProposals needs a model with CLIP, which MODEL.META_ARCHITECTURE "
                f"{cfg.MODEL.META_ARCHITECTURE} is not; use Mask2FormerProposals"
            )
        source = f"the image tower of MODEL.OVSEG.CLIP.NAME {cfg.MODEL.OVSEG.CLIP.NAME}"
        return build_decoders(cfg, clip.visual.output_shape(), source=source, clip=clip)

    def forward(
        self, images: ImageBatch, features: ClipFeatures | None = None, text: TextClasses | None = None
    ) -> MaskProposals:
        """
        Args:
            images: not used.
            features: with the layers ``MODEL.OVSEG.PROPOSALS.IN_FEATURES``.
            text: embeds (E, 1, D), for a text head.

        Returns:
            Proposals at the pixel decoder's common stride, with class logits (N, Q, K + 1) and ``aux``.
        """
        assert features is not None, "FCCLIPProposals needs CLIP's features"
        pixels = self.pixel_decoder(features.layers)
        return self.mask_decoder(pixels.multi_scale, pixels.mask_features, text)
