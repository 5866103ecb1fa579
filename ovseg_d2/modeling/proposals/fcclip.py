"""FC-CLIP as a source of mask proposals (arXiv 2308.02487, section 3.2): Mask2Former's decoders on a frozen CLIP."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import nn

from ovseg_d2.data.templates import get_templates
from ovseg_d2.modeling.clip.build import build_clip, clip_tokenizer
from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.proposals.build import MASK_PROPOSAL_REGISTRY
from ovseg_d2.modeling.proposals.decoders import build_decoders
from ovseg_d2.modeling.proposals.mask_decoder import MaskedAttentionDecoder
from ovseg_d2.modeling.proposals.pixel_decoder import MSDeformAttnPixelDecoder
from ovseg_d2.modeling.text_classifier import TextClassifier, averaged
from ovseg_d2.structures import ClipFeatures, ImageBatch, MaskProposals, TextClasses, Vocabulary


@MASK_PROPOSAL_REGISTRY.register()
class FCCLIPProposals(nn.Module):
    """Pixel decoder and masked-attention decoder; the backbone is the image tower of the model's CLIP.

    Or a frozen one of its own, where the model's CLIP is of another kind, or is tuned: a mask generator on a ConvNeXt,
    whose masks a ViT classifies. A text head then has the texts of that CLIP. MAFT+ (arXiv 2408.00744) has the same
    generator on a CLIP that it has tuned itself.
    """

    @configurable
    def __init__(
        self,
        *,
        pixel_decoder: MSDeformAttnPixelDecoder,
        mask_decoder: MaskedAttentionDecoder,
        clip: Clip | None = None,
        text_classifier: TextClassifier | None = None,
    ) -> None:
        """
        Args:
            clip: its own; None for the model's.
            text_classifier: for a text head, where ``clip`` has a text tower.
        """
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.mask_decoder = mask_decoder
        self.clip = clip.requires_grad_(False).eval() if clip is not None else None
        self.text_classifier = text_classifier

    @property
    def needs_clip_features(self) -> bool:
        """Whether :meth:`forward` needs the features of the model's CLIP."""
        return self.clip is None

    @property
    def has_own_text(self) -> bool:
        """Whether its classes are those of :meth:`own_text`, not of the model's CLIP."""
        return self.text_classifier is not None

    def own_text(self, vocabulary: Vocabulary) -> TextClasses:
        """Embeddings (E, 1, D) of its own CLIP, averaged over the templates."""
        assert self.clip is not None and self.text_classifier is not None, "the generator has no text tower"
        return averaged(self.text_classifier(self.clip.text, vocabulary))

    @classmethod
    def from_config(cls, cfg: CfgNode, clip: Clip | None = None) -> dict[str, Any]:
        if clip is None:
            raise ValueError(
                "MODEL.OVSEG.PROPOSALS.NAME: FCCLIPProposals needs a model with CLIP, which MODEL.META_ARCHITECTURE "
                f"{cfg.MODEL.META_ARCHITECTURE} is not; use Mask2FormerProposals"
            )
        prop = cfg.MODEL.OVSEG.PROPOSALS
        if not prop.CLIP_NAME:
            source = f"the image tower of MODEL.OVSEG.CLIP.NAME {cfg.MODEL.OVSEG.CLIP.NAME}"
            return build_decoders(cfg, clip.visual.output_shape(), source=source, clip=clip)
        has_text = prop.CLASS_HEAD == "text"
        own = build_clip(prop.CLIP_NAME, with_text=has_text)
        decoders = build_decoders(
            cfg,
            own.visual.output_shape(),
            source=f"the image tower of MODEL.OVSEG.PROPOSALS.CLIP_NAME {prop.CLIP_NAME}",
            clip=own if has_text else clip,
        )
        return {"clip": own, "text_classifier": _text_classifier(cfg) if has_text else None, **decoders}

    def forward(
        self, images: ImageBatch, features: ClipFeatures | None = None, text: TextClasses | None = None
    ) -> MaskProposals:
        """
        Args:
            images: for an image tower of its own.
            features: with the layers ``MODEL.OVSEG.PROPOSALS.IN_FEATURES``; not used with a tower of its own.
            text: embeds (E, 1, D), for a text head; of the CLIP that it was trained with.

        Returns:
            Proposals at the pixel decoder's common stride, with class logits (N, Q, K + 1) and ``aux``.
        """
        if self.clip is not None:
            with torch.no_grad():
                features = self.clip.visual(images.tensor, masks_only=True)
        assert features is not None, "FCCLIPProposals needs CLIP's features"
        pixels = self.pixel_decoder(features.layers)
        return self.mask_decoder(pixels.multi_scale, pixels.mask_features, text)


def _text_classifier(cfg: CfgNode) -> TextClassifier:
    """For the generator's own text tower; by ``PROPOSALS.TEMPLATES``."""
    prop = cfg.MODEL.OVSEG.PROPOSALS
    return TextClassifier(
        tokenizer=clip_tokenizer(prop.CLIP_NAME),
        templates=get_templates(prop.TEMPLATES, key="MODEL.OVSEG.PROPOSALS.TEMPLATES"),
        cache_dir=cfg.MODEL.OVSEG.TEXT.CACHE_DIR,
    )
