"""Maps of words: how alike pixels and texts are at several places of a model, and what it makes of that."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.inference.mask_inference import crop_and_resize
from ovseg_d2.modeling.layers.attention import CrossAttention
from ovseg_d2.modeling.mask_classification.content_transfer import transferred_logits
from ovseg_d2.modeling.mask_classification.mask_encoder import MaskEncoder, divisor_of
from ovseg_d2.modeling.mask_classification.similarity import cosine_logits
from ovseg_d2.modeling.meta_arch.dense_clip import DenseCLIP
from ovseg_d2.modeling.meta_arch.fga_seg import FGASeg
from ovseg_d2.modeling.meta_arch.ldvc import LDVC, ZegCLIP
from ovseg_d2.modeling.meta_arch.maft_plus import MAFTPlus
from ovseg_d2.modeling.meta_arch.open_vocabulary import ClipSegmentor
from ovseg_d2.modeling.meta_arch.training_free import TrainingFree
from ovseg_d2.modeling.text_classifier import averaged, class_logits
from ovseg_d2.structures import ImageBatch, Vocabulary

Maps = dict[str, Tensor]


@singledispatch
def similarity_maps(model: nn.Module, images: ImageBatch, vocabulary: Vocabulary) -> Maps:
    """Maps (N, K, h, w) on the padded images, by name, from CLIP's own to the model's result.

    Raises:
        ValueError: the model has no CLIP whose pixels could be compared with texts.
    """
    raise ValueError(
        f"{type(model).__name__} compares no pixels with texts; expected a model whose CLIP has dense features, such "
        "as LDVC, FGASeg, DenseCLIP, or TrainingFree with MODEL.OVSEG.TRAINING_FREE.CLASSIFY 'dense'"
    )


@similarity_maps.register
def _clip(model: ClipSegmentor, images: ImageBatch, vocabulary: Vocabulary) -> Maps:
    dense, copy = clip_dense(model, images)
    cosines = _cosines(model, dense, vocabulary)
    if copy is not images:
        cosines = F.interpolate(cosines, size=copy.padded_size, mode="bilinear", align_corners=False)
        cosines = _encoder_of(model).to_frame(cosines, copy, images)
    maps = {"CLIP": cosines}
    if isinstance(model, MAFTPlus) and model.content_transfer is not None:
        text = averaged(model.text(vocabulary))
        rows = model.content_transfer(text.embeds[:, 0], dense)
        logits = transferred_logits(dense.flatten(2).mT, rows, torch.ones((), device=dense.device))
        maps["texts of the image"] = class_logits(logits, text.class_ids, len(text)).mT.unflatten(-1, dense.shape[-2:])
    if isinstance(model, TrainingFree):
        maps["result"] = model.predict(images, vocabulary).mask_logits.sigmoid()
    return maps


@similarity_maps.register
def _ldvc(model: LDVC, images: ImageBatch, vocabulary: Vocabulary) -> Maps:
    """With the last decoder layer's cross-attention, averaged over its heads (LDVC, arXiv 2403.08426, figure 1)."""
    dense, text, layers = model.encode(images.tensor, vocabulary)
    maps = {"CLIP": torch.einsum("ndhw,kd->nkhw", dense, model.text(vocabulary).embeds[:, 0])}
    if isinstance(model, ZegCLIP):
        logits = model.decode(dense, text, layers)[-1]
        # Texts look at pixels: these logits are what a softmax over the pixels would follow.
        maps["attention"] = logits.flatten(2).softmax(-1).view_as(logits)
    else:
        block = model.decoder.blocks[-1]
        seen: list[Tensor] = []
        handle = block.cross_attention.register_forward_pre_hook(lambda _, x: seen.append(_weights(block, *x)))
        try:
            logits = model.decode(dense, text, layers)[-1]
        finally:
            handle.remove()
        maps["attention"] = seen[0].mT.unflatten(-1, logits.shape[-2:])
    return {**maps, "result": model.scores(logits)}


@similarity_maps.register
def _fga_seg(model: FGASeg, images: ImageBatch, vocabulary: Vocabulary) -> Maps:
    return {**pseudo_masks(model, images, vocabulary), "result": model.scores(model.batch_logits(images, vocabulary))}


@similarity_maps.register
def _dense_clip(model: DenseCLIP, images: ImageBatch, vocabulary: Vocabulary) -> Maps:
    logits, scores = model.logits_and_scores(images.tensor, vocabulary)
    maps = {} if scores is None else {"pixel-text scores": scores}
    return {**maps, "result": logits.softmax(dim=1)}


def pseudo_masks(model: nn.Module, images: ImageBatch, vocabulary: Vocabulary) -> Maps:
    """Global and local category supplementation (N, K, h, w), on the padded images (FGA-seg, arXiv 2501.00877, fig. 6).

    Raises:
        ValueError: the model has none.
    """
    if not isinstance(model, FGASeg):
        raise ValueError(f"{type(model).__name__} has no pseudo-masks; expected FGASeg or CATSeg")
    frame, dense, text, _ = model.encode(images, vocabulary)
    similar, local = model.cost_head.similarity(dense, text)
    maps = {"global": similar.mean(dim=1)} | ({} if local is None else {"local": local})
    return {name: model.on_frame(one, frame, images) for name, one in maps.items()}


def has_dense(model: nn.Module) -> bool:
    """Whether the model's CLIP gives an embedding for each position."""
    if not isinstance(model, ClipSegmentor):
        return False
    visual = model.clip.visual
    return getattr(visual, "last_block", getattr(visual, "dense", "none")) not in ("none", False)


def has_maps(model: nn.Module) -> bool:
    """Whether :func:`similarity_maps` takes the model."""
    return isinstance(model, DenseCLIP) or has_dense(model)


def clip_dense(model: ClipSegmentor, images: ImageBatch) -> tuple[Tensor, ImageBatch]:
    """CLIP's dense embeddings (N, D, h, w), and the images as it got them.

    Raises:
        ValueError: this model's CLIP gives none.
    """
    visual = model.clip and model.clip.visual
    encoder = _encoder_of(model)
    copy = images
    if visual is not None and encoder is not None:
        copy = encoder.clip_copy(images, divisor=divisor_of(visual))
    proxy = getattr(model, "proxy", None)
    dense = None if visual is None else visual(copy.tensor, **({} if proxy is None else {"proxy": proxy})).dense
    if dense is None:
        similarity_maps.dispatch(nn.Module)(model, images, None)
    return dense, copy


def on_image(maps: Tensor, images: ImageBatch, row: int, size: tuple[int, int]) -> Tensor:
    """Maps (K, h, w) of one of the padded images, at its size in the results (K, H, W)."""
    maps = F.interpolate(maps[None].float(), size=images.padded_size, mode="bilinear", align_corners=False)[0]
    return crop_and_resize(maps, image_size=images.image_sizes[row], output_size=size)


def _encoder_of(model: nn.Module) -> MaskEncoder | None:
    """What gives the images to CLIP at a size of its own."""
    return getattr(model, "mask_encoder", None) or getattr(model, "clip_frame", None)


def _cosines(model: ClipSegmentor, dense: Tensor, vocabulary: Vocabulary) -> Tensor:
    one = torch.ones((), device=dense.device)
    return cosine_logits(dense.permute(0, 2, 3, 1), averaged(model.text(vocabulary)), one).permute(0, 3, 1, 2)


def _weights(block: nn.Module, query: Tensor, memory: Tensor) -> Tensor:
    """Attention weights (N, Q, L) of a block's cross-attention, averaged over the heads."""
    attention: CrossAttention = block.cross_attention
    q, k = (
        project(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for project, x in ((attention.q_proj, query), (attention.k_proj, memory))
    )
    return (attention.scale * q @ k.mT).softmax(-1).mean(dim=1)
