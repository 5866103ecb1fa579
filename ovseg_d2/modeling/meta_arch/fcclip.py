"""FC-CLIP (arXiv 2308.02487): one frozen convolutional CLIP as backbone and as classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ovseg_d2.modeling.layers.mask_pooling import downsample_masks
from ovseg_d2.modeling.losses.set_criterion import SetCriterion
from ovseg_d2.modeling.mask_classification.ensemble import geometric_ensemble, normalised_logits, with_void
from ovseg_d2.modeling.mask_classification.similarity import cosine_logits
from ovseg_d2.modeling.meta_arch.open_vocabulary import ClipSegmentor
from ovseg_d2.modeling.proposals import build_mask_proposals
from ovseg_d2.modeling.text_classifier import averaged
from ovseg_d2.structures import (
    ClipFeatures,
    ImageBatch,
    MaskProposals,
    SegmentationTargets,
    TextClasses,
    Vocabulary,
)


@META_ARCH_REGISTRY.register()
class FCCLIP(ClipSegmentor):
    """Masks from a generator that classifies them itself (in-vocabulary); in evaluation the frozen CLIP, which pools
    its own features in the masks, has a say, too (out-of-vocabulary, section 3.3)."""

    #: Whether CLIP's image tower may train.
    tunes_clip = False

    @configurable
    def __init__(
        self,
        *,
        proposals: nn.Module,
        criterion: SetCriterion,
        ensemble_alpha: float,
        ensemble_beta: float,
        ensemble_valid_masks_only: bool,
        **shared: Any,
    ) -> None:
        """
        Args:
            proposals: images, features, classes -> :class:`MaskProposals` with class logits.
            ensemble_alpha, ensemble_beta: see :mod:`ovseg_d2.modeling.mask_classification.ensemble`.
            ensemble_valid_masks_only: masks that vanish at the resolution of CLIP's features are left to the generator.
            shared: see :class:`ClipSegmentor`.
        """
        super().__init__(**shared)
        self.proposals = proposals
        self.criterion = criterion
        self.ensemble_alpha, self.ensemble_beta = ensemble_alpha, ensemble_beta
        self.ensemble_valid_masks_only = ensemble_valid_masks_only
        if not self.tunes_clip:
            self.clip.requires_grad_(False)  # so it stays in evaluation mode, too

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        options, ensemble = cfg.MODEL.OVSEG.CLIP, cfg.MODEL.OVSEG.ENSEMBLE
        if not cls.tunes_clip and options.TRAINABLE != "frozen":
            raise ValueError(f"MODEL.OVSEG.CLIP.TRAINABLE: got {options.TRAINABLE!r}; FC-CLIP's CLIP is 'frozen'")
        if cfg.MODEL.OVSEG.PROPOSALS.CLIP_NAME:
            raise ValueError(
                f"MODEL.OVSEG.PROPOSALS.CLIP_NAME: got {cfg.MODEL.OVSEG.PROPOSALS.CLIP_NAME!r}; FC-CLIP has one CLIP, "
                "expected ''"
            )
        head = cfg.MODEL.OVSEG.PROPOSALS.CLASS_HEAD
        if head != "text":
            raise ValueError(f"MODEL.OVSEG.PROPOSALS.CLASS_HEAD: got {head!r}; FC-CLIP needs 'text'")
        shared = cls.shared_from_config(cfg, **cls.clip_options(cfg))
        proposals = build_mask_proposals(cfg, shared["clip"])
        if not hasattr(proposals, "mask_decoder"):
            raise ValueError(
                f"MODEL.OVSEG.PROPOSALS.NAME: masks of {cfg.MODEL.OVSEG.PROPOSALS.NAME} have no classes, which FC-CLIP "
                "needs; use FCCLIPProposals, or MODEL.META_ARCHITECTURE TrainingFree"
            )
        return {
            "proposals": proposals,
            "criterion": SetCriterion.from_config(cfg),
            "ensemble_alpha": ensemble.ALPHA,
            "ensemble_beta": ensemble.BETA,
            "ensemble_valid_masks_only": ensemble.VALID_MASKS_ONLY,
            **shared,
        }

    @staticmethod
    def clip_options(cfg: CfgNode) -> dict[str, Any]:
        """What CLIP's image encoder computes beside its ordinary features."""
        return {}

    def losses(
        self, images: ImageBatch, targets: Sequence[SegmentationTargets], vocabulary: Vocabulary | None
    ) -> dict[str, Tensor]:
        text = averaged(self.text(self.required(vocabulary)))
        proposals = self.proposals(images, self.clip_features(images), text)
        return self.criterion(proposals, targets, images.image_ids)

    def predict(self, images: ImageBatch, vocabulary: Vocabulary) -> MaskProposals:
        text = averaged(self.text(vocabulary))
        features = self.clip_features(images)
        proposals = self.proposals(images, features, text)
        return replace(proposals, class_logits=self.ensemble(proposals, features, text))

    @torch.no_grad()
    def clip_features(self, images: ImageBatch) -> ClipFeatures:
        return self.clip.visual(images.tensor)

    def ensemble(self, proposals: MaskProposals, features: ClipFeatures, text: TextClasses) -> Tensor:
        """The generator's and CLIP's classification in one (equation 6): logarithms of probabilities (N, Q, K + 1)."""
        mask_logits = proposals.mask_logits
        clip_logits = self.clip_logits(features, mask_logits, text)
        proposal_logits = proposals.class_logits.float()
        judged: Tensor | float = 1.0
        if self.ensemble_valid_masks_only:
            visible = (downsample_masks(mask_logits, features.grid) > 0).flatten(2).any(dim=-1)
            judged = visible[..., None].float()
        class_probs = geometric_ensemble(
            proposal_logits[..., :-1].softmax(-1),
            clip_logits.softmax(-1),
            text.seen,
            alpha=self.ensemble_alpha * judged,
            beta=self.ensemble_beta * judged,
        )
        return with_void(normalised_logits(class_probs), proposal_logits.softmax(-1)[..., -1])

    def clip_logits(self, features: ClipFeatures, mask_logits: Tensor, text: TextClasses) -> Tensor:
        """CLIP's classification (N, Q, K) of masks (N, Q, h, w)."""
        mask_embeds = self.clip.visual.encode_masks(features, mask_logits, from_logits=True)
        return cosine_logits(mask_embeds, text, self.clip.scale())
