"""Embeddings of masks or pixels with the classes they have in truth (MTA-CLIP, arXiv 2407.21654, figure 1 b)."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.inspection.maps import clip_dense, has_dense
from ovseg_d2.inspection.masks import mask_opinions, true_classes
from ovseg_d2.modeling.clip.name_tokenizer import first_names
from ovseg_d2.modeling.meta_arch.dense_clip import DenseCLIP
from ovseg_d2.modeling.meta_arch.fcclip import FCCLIP
from ovseg_d2.modeling.meta_arch.fga_seg import FGASeg
from ovseg_d2.modeling.meta_arch.frozen_clip import FrozenCLIP
from ovseg_d2.modeling.meta_arch.ldvc import LDVC
from ovseg_d2.modeling.meta_arch.maft_plus import MAFTPlus
from ovseg_d2.modeling.meta_arch.maskclippp import MaskCLIPpp
from ovseg_d2.modeling.meta_arch.mta_clip import MTACLIP
from ovseg_d2.modeling.text_classifier import averaged
from ovseg_d2.structures import ImageBatch, Vocabulary


@singledispatch
def mask_embeds(model: nn.Module, images: ImageBatch, vocabulary: Vocabulary) -> Tensor:
    """(N, Q, D) of the masks of :func:`mask_opinions`, in the space of texts.

    Raises:
        ValueError: the model has none.
    """
    raise ValueError(
        f"{type(model).__name__} embeds no masks among texts; expected FCCLIP, MAFTPlus, FrozenCLIP, MAFT, "
        "MaskCLIPpp, or MTACLIP with MODEL.OVSEG.MTA_CLIP.LOSS_WEIGHT above 0"
    )


@mask_embeds.register
def _fcclip(model: FCCLIP, images: ImageBatch, vocabulary: Vocabulary) -> Tensor:
    features = model.clip_features(images)
    mask_logits = model.proposals(images, features, averaged(model.text(vocabulary))).mask_logits
    return model.clip.visual.encode_masks(features, mask_logits, from_logits=True)


@mask_embeds.register
def _frozen_clip(model: FrozenCLIP, images: ImageBatch, vocabulary: Vocabulary) -> Tensor:
    generated = model.propose(model.proposals, images, model.query_text(vocabulary), vocabulary)
    return model.mask_embeds(images, generated)[0]


@mask_embeds.register
def _maskclippp(model: MaskCLIPpp, images: ImageBatch, vocabulary: Vocabulary) -> Tensor:
    frame = model.generator_copy(images)
    generated, _ = model.generated(frame, vocabulary)
    return model.mask_encoder(model.clip.visual, frame, generated)[0]


@mask_embeds.register
def _mta_clip(model: MTACLIP, images: ImageBatch, vocabulary: Vocabulary) -> Tensor:
    if model.alignment is None:
        return mask_embeds.dispatch(nn.Module)(model, images, vocabulary)
    return model.projected(*model.propose(images, vocabulary))[0]


def has_mask_embeds(model: nn.Module) -> bool:
    """Whether :func:`mask_embeds` takes the model."""
    embedded = mask_embeds.dispatch(type(model)) is not mask_embeds.dispatch(nn.Module)
    return embedded and (not isinstance(model, MTACLIP) or model.alignment is not None)


def labelled_masks(
    model: nn.Module, images: ImageBatch, vocabulary: Vocabulary, class_ids: list[Tensor], masks: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Unit vectors (L, D) of the masks that are like one of the truth (IoU of at least 0.5), and its classes (L,).

    Args:
        class_ids, masks: the truth of each image, (M,) and (M, H, W) bool at its size in the results.
    """
    opinions, embeds = mask_opinions(model, images, vocabulary), mask_embeds(model, images, vocabulary)
    found, labels = [], []
    for row, (ids, truth) in enumerate(zip(class_ids, masks, strict=True)):
        if not len(ids):
            continue
        classes = true_classes(opinions.masks(row, tuple(truth.shape[-2:])), ids, truth)
        like = (classes >= 0) & opinions.valid[row]
        found.append(embeds[row][like])
        labels.append(classes[like])
    return _unit_vectors(found, labels, embeds)


def labelled_pixels(
    model: nn.Module, images: ImageBatch, class_ids: list[Tensor], masks: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Unit vectors (L, D) of CLIP's positions that lie on a mask of the truth, and its classes (L,); arguments as for
    :func:`labelled_masks`.

    Raises:
        ValueError: the model's CLIP gives no embeddings of positions.
    """
    if not has_dense(model):
        raise ValueError(
            f"{type(model).__name__} has no pixels among texts; expected a model with CLIP's dense features"
        )
    if isinstance(model, LDVC | DenseCLIP):
        dense, frame = model.clip.visual(images.tensor).dense, images
    elif isinstance(model, FGASeg):
        frame = model.clip_frame.clip_copy(images, divisor=model.clip.visual.patch_size)
        dense = model.clip.visual(frame.tensor).dense
    else:
        dense, frame = clip_dense(model, images)
    height, width = frame.padded_size
    found, labels = [], []
    for row, (ids, truth) in enumerate(zip(class_ids, masks, strict=True)):
        h, w = frame.image_sizes[row]
        # The positions that are no padding, each with the truth at its middle.
        rows = round(dense.shape[-2] * h / height), round(dense.shape[-1] * w / width)
        small = F.interpolate(truth[None].float(), size=rows, mode="nearest-exact")[0].to(dense.device)
        inside = small.any(dim=0)
        if not len(ids) or not inside.any():
            continue
        found.append(dense[row, :, : rows[0], : rows[1]][:, inside].T)
        labels.append(ids.to(dense.device)[small.argmax(dim=0)[inside]])
    return _unit_vectors(found, labels, dense.movedim(1, -1))


def class_texts(model: nn.Module, images: ImageBatch, vocabulary: Vocabulary) -> Tensor:
    """Unit vectors (K, D) of the classes where the embeddings of masks or pixels are compared with them; of those that
    the images have a part in, the mean. (0, D) for a model without texts."""
    if isinstance(model, MTACLIP) and model.alignment is not None:
        texts = model.projected(*model.propose(images, vocabulary))[1].mean(dim=(0, 1))
    elif isinstance(model, DenseCLIP):
        if model.scores is None:
            return torch.zeros(0, model.clip.embed_dim)
        contexts = model.scores.contexts
        texts = model.text_classifier(model.clip.text, first_names(vocabulary), prompts=contexts).embeds[:, 0]
    else:
        text = averaged(model.region_text(vocabulary) if isinstance(model, FrozenCLIP) else model.text(vocabulary))
        rows = text.embeds[:, 0]
        if isinstance(model, MAFTPlus) and model.content_transfer is not None:
            rows = model.content_transfer(rows, model.clip_features(images).dense).mean(dim=0)
        texts = rows[torch.searchsorted(text.class_ids, torch.arange(len(text), device=text.class_ids.device))]
    return F.normalize(texts.float(), dim=-1)


def _unit_vectors(found: list[Tensor], labels: list[Tensor], embeds: Tensor) -> tuple[Tensor, Tensor]:
    """All (L, D) of length 1, and (L,); L may be 0."""
    if not found:
        found, labels = [embeds.new_zeros(0, embeds.shape[-1])], [embeds.new_zeros(0, dtype=torch.int64)]
    return F.normalize(torch.cat(found).float(), dim=-1), torch.cat(labels)
