"""Masks and what each classifier of a model says of them (MAFT, arXiv 2310.00240, figures 3 and 7)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from ovseg_d2.evaluation.mask_recall import mask_ious
from ovseg_d2.inspection.maps import on_image
from ovseg_d2.modeling.mask_classification.similarity import cosine_logits
from ovseg_d2.modeling.meta_arch.fcclip import FCCLIP
from ovseg_d2.modeling.meta_arch.frozen_clip import FrozenCLIP
from ovseg_d2.modeling.meta_arch.mask2former import Mask2Former
from ovseg_d2.modeling.meta_arch.maskclippp import MaskCLIPpp
from ovseg_d2.modeling.meta_arch.training_free import TrainingFree
from ovseg_d2.modeling.text_classifier import averaged
from ovseg_d2.structures import ImageBatch, MaskProposals, Vocabulary


@dataclass
class MaskOpinions:
    """Masks of N images, and who says what of them.

    Attributes:
        mask_logits: (N, Q, h, w) on the padded ``frame``.
        frame: the images as the mask generator had them.
        probs: by classifier, "generator", "CLIP" and "ensemble" as far as the model has them: (N, Q, K) or, with "no
            object" last, (N, Q, K + 1). The last of them is what counts.
        valid: (N, Q) bool, False where a row only fills the batch.
    """

    mask_logits: Tensor
    frame: ImageBatch
    probs: dict[str, Tensor]
    valid: Tensor

    def masks(self, row: int, size: tuple[int, int]) -> Tensor:
        """(Q, H, W) bool of one image, at its size in the results."""
        return on_image(self.mask_logits[row], self.frame, row, size) > 0


@singledispatch
def mask_opinions(model: nn.Module, images: ImageBatch, vocabulary: Vocabulary) -> MaskOpinions:
    """The masks of a model in evaluation mode, and what is said of them.

    Raises:
        ValueError: the model has no masks.
    """
    raise ValueError(
        f"{type(model).__name__} classifies pixels and has no masks; expected a model that names masks, such as "
        "FCCLIP, MAFT, MaskCLIPpp, Mask2Former"
    )


@mask_opinions.register
def _mask2former(model: Mask2Former, images: ImageBatch, vocabulary: Vocabulary) -> MaskOpinions:
    proposals = model.predict(images, vocabulary)
    return _opinions(proposals, images, generator=_probs(proposals))


@mask_opinions.register
def _fcclip(model: FCCLIP, images: ImageBatch, vocabulary: Vocabulary) -> MaskOpinions:
    text, features = averaged(model.text(vocabulary)), model.clip_features(images)
    generated = model.proposals(images, features, text)
    clip_logits = model.clip_logits(features, generated.mask_logits, text)
    final = model.predict(images, vocabulary)
    return _opinions(
        generated, images, generator=_probs(generated), CLIP=clip_logits.softmax(-1), ensemble=_probs(final)
    )


@mask_opinions.register
def _frozen_clip(model: FrozenCLIP, images: ImageBatch, vocabulary: Vocabulary) -> MaskOpinions:
    generated = model.propose(model.proposals, images, model.query_text(vocabulary), vocabulary)
    embeds, _ = model.mask_embeds(images, generated)
    probs = {} if generated.class_logits is None else {"generator": _probs(generated)}
    probs["CLIP"] = cosine_logits(embeds, model.region_text(vocabulary), model.clip.scale()).softmax(-1)
    if model.ensemble.name != "none":
        probs["ensemble"] = model.predict(images, vocabulary).class_probs[..., :-1]
    return _opinions(generated, images, **probs)


@mask_opinions.register
def _maskclippp(model: MaskCLIPpp, images: ImageBatch, vocabulary: Vocabulary) -> MaskOpinions:
    frame = model.generator_copy(images)
    generated, mask_probs = model.generated(frame, vocabulary)
    clip_logits = model.clip_logits(images, frame, mask_probs, model.text(vocabulary))
    logits = model.generator_classes.proposal_logits(generated.class_logits, vocabulary)
    probs = {} if logits is None else {"generator": logits.softmax(-1)}
    probs["CLIP"] = clip_logits.float().softmax(-1)
    if logits is not None:
        probs["ensemble"] = model.generator_classes.combine(clip_logits, generated, vocabulary).softmax(-1)
    return _opinions(generated, frame, **probs)


@mask_opinions.register
def _training_free(model: TrainingFree, images: ImageBatch, vocabulary: Vocabulary) -> MaskOpinions:
    if model.proposals is None:
        return mask_opinions.dispatch(nn.Module)(model, images, vocabulary)
    proposals = model.predict(images, vocabulary)
    return _opinions(proposals, images, CLIP=proposals.class_logits[..., :-1].softmax(-1))


def _probs(proposals: MaskProposals) -> Tensor:
    """(N, Q, K + 1)."""
    if proposals.class_probs is not None:
        return proposals.class_probs
    return proposals.class_logits.float().softmax(-1)


def _opinions(proposals: MaskProposals, frame: ImageBatch, **probs: Any) -> MaskOpinions:
    valid = proposals.valid
    if valid is None:
        valid = torch.ones(proposals.mask_logits.shape[:2], dtype=torch.bool, device=proposals.mask_logits.device)
    return MaskOpinions(mask_logits=proposals.mask_logits, frame=frame, probs=probs, valid=valid)


def has_opinions(model: nn.Module) -> bool:
    """Whether :func:`mask_opinions` takes the model."""
    named = mask_opinions.dispatch(type(model)) is not mask_opinions.dispatch(nn.Module)
    return named and (not isinstance(model, TrainingFree) or model.proposals is not None)


def true_classes(masks: Tensor, class_ids: Tensor, truth: Tensor, *, min_iou: float = 0.5) -> Tensor:
    """The class of the mask of the truth that each mask is most like, -1 where none is like it: (Q,) int64.

    Args:
        masks: (Q, H, W) bool.
        class_ids, truth: of M masks, (M,) and (M, H, W) bool.
        min_iou: masks are alike from it on.
    """
    if not len(class_ids):
        return torch.full((len(masks),), -1, dtype=torch.int64, device=masks.device)
    iou, best = mask_ious(masks.flatten(1), truth.to(masks.device).flatten(1)).max(dim=1)
    return torch.where(iou >= min_iou, class_ids.to(best)[best], -1)


def best_masks(
    masks: Tensor, scores: Tensor, number: int, *, max_iou: float = 0.7, min_share: float = 0.005
) -> list[int]:
    """Rows of the masks with the highest scores, none of them next to empty or much like one that is before it.

    Args:
        masks: (Q, H, W) bool.
        scores: (Q,).
        number: at most as many.
        max_iou: two masks are much alike above it.
        min_share: of the picture; smaller masks are left out.
    """
    masks = masks.flatten(1)
    iou, shares = mask_ious(masks, masks), masks.float().mean(1)
    chosen: list[int] = []
    for row in scores.argsort(descending=True).tolist():
        if len(chosen) < number and shares[row] >= max(min_share, 1e-9) and not (iou[row, chosen] > max_iou).any():
            chosen.append(row)
    return chosen
