"""CLIP as it is: masks of any generator, or single pixels, named without any training.

Masks: the proposals' crops (ZSSeg, arXiv 2112.14757, OVSeg 2210.04150, ZegFormer 2112.07910), or their embeddings from
one pass over the image (mask pooling; mask tokens of a ViT, as in MAFT 2310.00240 before its tuning). Pixels: the dense
embeddings of MaskCLIP (2112.01071), SCLIP (2312.01597), ClearCLIP (2407.12442) or ProxyCLIP (2408.04883).

CLIP may be one that a method has tuned: of MaskCLIP++'s checkpoints (2412.11464, Table 8) it is taken, and the
similarity is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.clip.architectures import tower_kind
from ovseg_d2.modeling.clip.proxy_model import ProxyModel
from ovseg_d2.modeling.mask_classification.ensemble import with_void
from ovseg_d2.modeling.mask_classification.mask_encoder import MaskEncoder, divisor_of
from ovseg_d2.modeling.mask_classification.similarity import cosine_logits
from ovseg_d2.modeling.meta_arch.open_vocabulary import ClipSegmentor
from ovseg_d2.modeling.proposals import build_mask_proposals
from ovseg_d2.modeling.text_classifier import averaged
from ovseg_d2.structures import (
    ImageBatch,
    MaskProposals,
    SegmentationTargets,
    TextClasses,
    Vocabulary,
)

CLASSIFY = ("crops", "masks", "dense")
_SCALE = "clip.visual.mask_logit_scale"


@META_ARCH_REGISTRY.register()
class TrainingFree(ClipSegmentor):
    """A frozen CLIP names masks or pixels; the temperature is its own logit scale."""

    #: What checkpoints of MaskCLIP++ hold beside CLIP, by the beginnings of the names; of use only where it is in ours.
    ignored_weights = ("similarity.", _SCALE)

    @configurable
    def __init__(
        self,
        *,
        classify: str,
        mask_encoder: MaskEncoder,
        proposals: nn.Module | None = None,
        objectness: bool = True,
        proxy: ProxyModel | None = None,
        **shared: Any,
    ) -> None:
        """
        Args:
            classify: "crops" (every mask is a picture), "masks" (one pass, embeddings of masks) or "dense" (no masks).
            mask_encoder: images and masks -> what CLIP makes of them; with crops for "crops".
            proposals: the mask generator; None with "dense".
            objectness: the generator's probability of "no object" counts, where it has one.
            proxy: for CLIP's last block "proxy".
            shared: see :class:`ClipSegmentor`.

        Raises:
            ValueError: ``classify`` is none of these, or "dense" for other results than semantic ones.
        """
        super().__init__(**shared)
        if classify not in CLASSIFY:
            raise ValueError(f"MODEL.OVSEG.TRAINING_FREE.CLASSIFY is {classify!r}; allowed are {', '.join(CLASSIFY)}")
        if classify == "dense" and self.inference.tasks != {"semantic"}:
            raise ValueError(
                f"MODEL.OVSEG.TEST.TASKS is {sorted(self.inference.tasks)}, but MODEL.OVSEG.TRAINING_FREE.CLASSIFY "
                "'dense' knows no objects; expected ['semantic']"
            )
        self.classify = classify
        self.objectness = objectness
        self.mask_encoder = mask_encoder
        self.proposals = proposals
        self.proxy = proxy
        self.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        ovseg = cfg.MODEL.OVSEG
        classify = ovseg.TRAINING_FREE.CLASSIFY
        shared = cls.shared_from_config(cfg, **_visual_options(cfg))
        return {
            "classify": classify,
            "proposals": None if classify == "dense" else build_mask_proposals(cfg, shared["clip"]),
            "mask_encoder": MaskEncoder.from_config(cfg, crops=classify == "crops"),
            "objectness": ovseg.TRAINING_FREE.OBJECTNESS,
            "proxy": ProxyModel.from_config(cfg) if _has_proxy(cfg) else None,
            **shared,
        }

    def fill_missing(self, given: set[str]) -> set[str]:
        """The scale of mask tokens, which no CLIP has before its tuning: that of the start."""
        return {name for name in self.state_dict() if name == _SCALE and name not in given}

    def losses(
        self, images: ImageBatch, targets: Sequence[SegmentationTargets], vocabulary: Vocabulary | None
    ) -> dict[str, Tensor]:
        """
        Raises:
            ValueError: always, there is nothing to train.
        """
        raise ValueError("TrainingFree has nothing to train; evaluate it with --eval-only")

    def predict(self, images: ImageBatch, vocabulary: Vocabulary) -> MaskProposals:
        """The generator's masks with CLIP's class logits; for "dense" one mask a class, its pixels' probability."""
        text = averaged(self.text(vocabulary))
        if self.classify == "dense":
            return self._dense(images, text)
        proposals = self.propose(self.proposals, images, text, vocabulary)
        embeds, valid = self.mask_encoder(self.clip.visual, images, proposals)
        logits = cosine_logits(embeds, text, self.clip.scale())
        void_probs = logits.new_zeros(logits.shape[:2])
        if self.objectness and proposals.class_logits is not None:
            void_probs = proposals.class_logits.float().softmax(-1)[..., -1]
        if valid is not None:
            void_probs = void_probs.masked_fill(~valid, 1.0)
        return MaskProposals(mask_logits=proposals.mask_logits, class_logits=with_void(logits, void_probs), valid=valid)

    def _dense(self, images: ImageBatch, text: TextClasses) -> MaskProposals:
        copy = self.mask_encoder.clip_copy(images, divisor=divisor_of(self.clip.visual))
        options = {} if self.proxy is None else {"proxy": self.proxy}
        dense = self.clip.visual(copy.tensor, **options).dense
        logits = cosine_logits(dense.permute(0, 2, 3, 1), text, self.clip.scale()).permute(0, 3, 1, 2)
        logits = F.interpolate(logits, size=copy.padded_size, mode="bilinear", align_corners=False)
        logits = self.mask_encoder.to_frame(logits, copy, images)
        # Mask k is class k. Its logit is that of the probability, which inference thus finds again.
        num_classes = len(text)
        one_hot = torch.eye(num_classes, num_classes + 1, device=logits.device).log()
        return MaskProposals(
            mask_logits=logits.softmax(dim=1).logit(eps=1e-6), class_logits=one_hot.expand(len(images), -1, -1)
        )


def _has_proxy(cfg: CfgNode) -> bool:
    free = cfg.MODEL.OVSEG.TRAINING_FREE
    return free.CLASSIFY == "dense" and free.LAST_BLOCK == "proxy"


def _visual_options(cfg: CfgNode) -> dict[str, Any]:
    """What the image encoder must compute, in the words of the tower that ``MODEL.OVSEG.CLIP.NAME`` has.

    Raises:
        ValueError: a last block that the tower does not have.
    """
    ovseg = cfg.MODEL.OVSEG
    free = ovseg.TRAINING_FREE
    kind = tower_kind(ovseg.CLIP.NAME)
    if kind in ("convnext", "resnet"):
        if free.CLASSIFY != "dense":
            return {}
        allowed = {"value": "value", "full": "attention"} if kind == "resnet" else {"value": True, "full": True}
        if free.LAST_BLOCK not in allowed:
            raise ValueError(
                f"MODEL.OVSEG.TRAINING_FREE.LAST_BLOCK is {free.LAST_BLOCK!r}; {ovseg.CLIP.NAME} has no transformer "
                f"blocks, allowed are {', '.join(allowed)}"
            )
        return {"dense": allowed[free.LAST_BLOCK]}
    if free.CLASSIFY == "dense":
        return {"last_block": free.LAST_BLOCK}
    if free.CLASSIFY == "masks":
        start = free.START_LAYER if free.START_LAYER >= 0 else None
        return {
            "last_block": "none",
            "mask_mode": free.MASK_MODE,
            "start_layer": start,
        }
    return {"last_block": "none"}
