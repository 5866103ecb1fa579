"""FreeSeg as a source of mask proposals (arXiv 2303.17225, section 3.4): Mask2Former with text-driven features."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import Backbone
from torch import Tensor

from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.proposals.build import MASK_PROPOSAL_REGISTRY
from ovseg_d2.modeling.proposals.class_heads import EmbedClassHead, TextClassHead
from ovseg_d2.modeling.proposals.context_interaction import ContextInteraction
from ovseg_d2.modeling.proposals.mask2former import Mask2FormerProposals
from ovseg_d2.modeling.proposals.mask_decoder import MaskedAttentionDecoder
from ovseg_d2.modeling.proposals.pixel_decoder import MSDeformAttnPixelDecoder
from ovseg_d2.structures import ClipFeatures, ImageBatch, MaskProposals, TextClasses


@MASK_PROPOSAL_REGISTRY.register()
class FreeSegProposals(Mask2FormerProposals):
    """What the pixel decoder gives looks at the classes before the mask decoder sees it; so masks depend on them."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        pixel_decoder: MSDeformAttnPixelDecoder,
        mask_decoder: MaskedAttentionDecoder,
        interaction: ContextInteraction,
    ) -> None:
        super().__init__(backbone=backbone, pixel_decoder=pixel_decoder, mask_decoder=mask_decoder)
        self.interaction = interaction

    @classmethod
    def from_config(cls, cfg: CfgNode, clip: Clip | None = None) -> dict[str, Any]:
        prop = cfg.MODEL.OVSEG.PROPOSALS
        if clip is None:
            raise ValueError(
                "MODEL.OVSEG.PROPOSALS.NAME: FreeSegProposals needs a model with CLIP, which MODEL.META_ARCHITECTURE "
                f"{cfg.MODEL.META_ARCHITECTURE} is not; use Mask2FormerProposals"
            )
        if prop.MASK_DIM != prop.PIXEL_DIM:
            raise ValueError(
                f"MODEL.OVSEG.PROPOSALS.MASK_DIM: got {prop.MASK_DIM}; FreeSegProposals, whose maps share one "
                f"attention to the texts, needs PIXEL_DIM, {prop.PIXEL_DIM}"
            )
        if prop.INTERACTION_DIM % prop.INTERACTION_HEADS:
            raise ValueError(
                f"MODEL.OVSEG.PROPOSALS.INTERACTION_DIM: got {prop.INTERACTION_DIM}; expected a multiple of "
                f"INTERACTION_HEADS, {prop.INTERACTION_HEADS}"
            )
        interaction = ContextInteraction(
            dim=prop.PIXEL_DIM,
            text_dim=clip.embed_dim,
            inner_dim=prop.INTERACTION_DIM,
            num_heads=prop.INTERACTION_HEADS,
        )
        return {**super().from_config(cfg, clip), "interaction": interaction}

    def forward(
        self, images: ImageBatch, features: ClipFeatures | None = None, text: TextClasses | None = None
    ) -> MaskProposals:
        """
        Args:
            features: not used.
            text: embeds (E, 1, D).

        Returns:
            Proposals at the pixel decoder's common stride, with class logits (N, Q, K + 1) and ``aux``.
        """
        assert text is not None, "FreeSegProposals needs classes"
        pixels = self.pixel_decoder(self.backbone(images.tensor))
        *multi_scale, mask_features = self.interaction(
            [*pixels.multi_scale, pixels.mask_features], self._text_rows(text)
        )
        return self.mask_decoder(multi_scale, mask_features, text)

    def _text_rows(self, text: TextClasses) -> Tensor:
        """(E, D) the entries of all classes, and the class head's row of "no object" (E + 1, D) if it has one."""
        assert text.embeds.shape[1] == 1, f"expected one prompt an entry, got {text.embeds.shape[1]}"
        rows, head = text.embeds[:, 0], self.mask_decoder.class_embed
        if isinstance(head, EmbedClassHead | TextClassHead):
            rows = torch.cat([rows, head.void_row().to(rows.dtype)])
        return rows
