"""Regions of an image as pictures of their own, for a CLIP that has never seen masks.

Two families. ZSSeg (arXiv 2112.14757), FreeSeg (2303.17225) and OVSeg (2210.04150) cut the box of a mask out, fill
what the mask leaves out and resize the piece ("mask_crop"). ZegFormer (2112.07910, section 3.4) multiplies the whole
image by the mask ("mask"), or pools the mask's box with RoIAlign, with or without the mask ("cropmask", "crop").
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD, ClipImageEncoder
from ovseg_d2.modeling.clip.image_prompts import MaskPrompts
from ovseg_d2.modeling.layers.boxes import bounding_boxes
from ovseg_d2.structures import ImageBatch, MaskProposals

STYLES = ("mask_crop", "mask", "cropmask", "crop")
FILLS = ("mean", "zero")
_CUBIC = -0.75  # torch's coefficient of bicubic interpolation


def expanded_boxes(boxes: Tensor, ratio: float, image_size: tuple[int, int]) -> Tensor:
    """Boxes (V, 4) x0, y0, x1, y1 grown about their centres, cut to whole pixels and to the image."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]) * ratio / 2
    height, width = image_size
    limit = boxes.new_tensor([width, height, width, height])
    return torch.cat([centre - half, centre + half], dim=1).trunc().clamp(min=0).minimum(limit)


def resize_matrices(starts: Tensor, ends: Tensor, *, length: int, size: int, align_corners: bool) -> Tensor:
    """Bicubic resizing of pieces of an axis as matrices, so that pieces of different length are one product.

    Args:
        starts, ends: (V,) the pieces [start, end) of an axis of ``length`` pixels; none is empty.
        size: pixels of every result.
        align_corners: as in :func:`torch.nn.functional.interpolate`.

    Returns:
        (V, size, length); beyond its ends a piece repeats its last pixels.
    """
    extent = (ends - starts).float()[:, None]
    steps = torch.arange(size, device=starts.device, dtype=torch.float32)
    position = steps * ((extent - 1) / max(size - 1, 1)) if align_corners else (steps + 0.5) * (extent / size) - 0.5
    position = position[..., None]
    taps = position.floor() + torch.arange(-1, 3, device=starts.device)
    gap = (position - taps).abs()
    near = ((_CUBIC + 2) * gap - (_CUBIC + 3)) * gap * gap + 1
    far = ((_CUBIC * gap - 5 * _CUBIC) * gap + 8 * _CUBIC) * gap - 4 * _CUBIC
    weights = torch.where(gap <= 1, near, far)
    taps = taps.clamp(min=0).minimum(extent[..., None] - 1) + starts[:, None, None]
    return weights.new_zeros(len(starts), size, length).scatter_add_(2, taps.long(), weights)


def masked_crops(
    image: Tensor, weights: Tensor, boxes: Tensor, *, size: int, fill: Tensor | float, align_corners: bool
) -> Tensor:
    """The box of each mask, filled where the mask is not, resized to a square (bicubic, its aspect not kept).

    Args:
        image: (C, H, W).
        weights: (V, H, W) masks in [0, 1]: how much of the image stays.
        boxes: (V, 4) x0, y0, x1, y1 in whole pixels, x1 and y1 just outside; none is empty.
        size: pixels a side.
        fill: (C, 1, 1) or a number, in the image's own scale.

    Returns:
        (V, C, size, size).
    """
    axes = {"size": size, "align_corners": align_corners}
    rows = resize_matrices(boxes[:, 1], boxes[:, 3], length=image.shape[1], **axes)
    columns = resize_matrices(boxes[:, 0], boxes[:, 2], length=image.shape[2], **axes)
    # Every row of the matrices sums to 1, so that the fill needs no resizing.
    pieces = weights[:, None] * (image - fill)
    return rows[:, None] @ pieces @ columns[:, None].mT + fill


def resized_masks(masks: Tensor, boxes: Tensor, *, size: int) -> Tensor:
    """Masks (V, H, W) inside their boxes (V, 4), by nearest neighbours: (V, size, size) (OVSeg's mask prompts)."""
    steps = torch.arange(size, device=masks.device, dtype=torch.float32)
    starts, ends = boxes[:, None, :2], boxes[:, None, 2:]
    places = (starts + (steps[:, None] * ((ends - starts) / size)).floor()).minimum(ends - 1).long()
    columns, rows = places.unbind(-1)
    return masks[torch.arange(len(masks), device=masks.device)[:, None, None], rows[:, :, None], columns[:, None]]


def region_boxes(masks: Tensor) -> Tensor:
    """ZegFormer's boxes (n, 4) of masks (n, H, W) bool: x1 and y1 are the *last* pixels, so that a box without area
    (nothing, or a line of one pixel) stands for the whole frame."""
    height, width = masks.shape[-2:]
    boxes = bounding_boxes(masks)
    boxes[:, 2:] -= 1
    flat = (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
    boxes[flat] = boxes.new_tensor([0, 0, width, height])
    return boxes


def region_images(images: Tensor, mask_logits: Tensor, *, style: str, size: int) -> Tensor:
    """ZegFormer's three kinds of picture of a region.

    Args:
        images: (N, C, H, W) normalised, so that 0 is the mean colour, which fills what a mask leaves out.
        mask_logits: (N, Q, h, w) on the frame of the images.
        style: mask, cropmask or crop.
        size: pixels a side.

    Returns:
        (N, Q, C, size, size).
    """
    shape = mask_logits.shape[:2]
    masks = F.interpolate(mask_logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
    if style == "mask":
        # Twice resized, as ZegFormer does.
        masks = F.interpolate(masks, size=(size, size), mode="bilinear", align_corners=False).sigmoid() > 0.5
        whole = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
        return whole[:, None] * masks[:, :, None]
    masks = masks.sigmoid() > 0.5
    boxes = region_boxes(masks.flatten(0, 1))
    if style == "cropmask":
        pictures = (images[:, None] * masks[:, :, None]).flatten(0, 1)
        owner = torch.arange(len(boxes), device=boxes.device)
    else:
        pictures = images
        owner = torch.arange(len(images), device=boxes.device).repeat_interleave(shape[1])
    regions = roi_align(pictures, torch.cat([owner[:, None].to(boxes), boxes], dim=1), size, aligned=True)
    return regions.unflatten(0, shape)


class CropEncoder(nn.Module):
    """Masks -> CLIP embeddings of their crops; without parameters."""

    def __init__(
        self,
        *,
        style: str,
        size: int,
        threshold: float = 0.5,
        fill: str = "mean",
        expand: float = 1.0,
        matting: bool = False,
        align_corners: bool = False,
        chunk_size: int = 32,
    ) -> None:
        """
        Args:
            style: mask_crop (ZSSeg, FreeSeg, OVSeg), or mask, cropmask, crop (ZegFormer).
            size: pixels a side of the crops.
            threshold: mask_crop: a pixel belongs to a mask whose probability exceeds it.
            fill: mask_crop: "mean" colour or "zero" (black) outside the mask.
            expand: mask_crop: boxes grow by this factor, 1 or more.
            matting: mask_crop: mask probabilities weigh the pixels, instead of 0 and 1.
            align_corners: mask_crop: of the resizing; True in FreeSeg.
            chunk_size: crops that are made and encoded at once.

        Raises:
            ValueError: a style or fill that does not exist, or boxes that would shrink.
        """
        super().__init__()
        for key, value, allowed in (("STYLE", style, STYLES), ("FILL", fill, FILLS)):
            if value not in allowed:
                raise ValueError(f"MODEL.OVSEG.CROPS.{key} is {value!r}; allowed are {', '.join(allowed)}")
        if expand < 1:  # a box of one pixel would be none
            raise ValueError(f"MODEL.OVSEG.CROPS.EXPAND is {expand}; expected at least 1")
        self.style, self.size, self.chunk_size = style, size, chunk_size
        self.threshold, self.expand, self.matting, self.align_corners = threshold, expand, matting, align_corners
        black = -torch.tensor(CLIP_PIXEL_MEAN) / torch.tensor(CLIP_PIXEL_STD)
        colour = black if fill == "zero" else torch.zeros(3)
        self.register_buffer("fill", colour.view(3, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> CropEncoder:
        crops = cfg.MODEL.OVSEG.CROPS
        options: dict[str, Any] = {
            "style": crops.STYLE,
            "size": crops.SIZE,
            "threshold": crops.THRESHOLD,
            "fill": crops.FILL,
            "expand": crops.EXPAND,
            "matting": crops.MATTING,
            "align_corners": crops.ALIGN_CORNERS,
            "chunk_size": crops.CHUNK_SIZE,
        }
        return cls(**options)

    def forward(
        self,
        visual: ClipImageEncoder,
        images: ImageBatch,
        proposals: MaskProposals,
        *,
        mask_prompts: MaskPrompts | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            images: normalised with CLIP's mean and standard deviation.
            proposals: masks at any resolution.
            mask_prompts: mask_crop: in place of the patches that a mask leaves out.

        Returns:
            Embeddings (N, Q, D), not normalised; valid (N, Q) bool. Rows that are not valid (only fill the batch; for
            mask_crop also masks without a pixel) are zeros.
        """
        valid = proposals.valid
        if valid is None:
            valid = torch.ones(proposals.mask_logits.shape[:2], dtype=torch.bool, device=proposals.mask_logits.device)
        rows = []
        for i in range(len(images)):
            if self.style == "mask_crop":
                rows.append(self._encode_boxes(visual, images, proposals.mask_logits, i, valid[i], mask_prompts))
            else:
                rows.append(self._encode_regions(visual, images, proposals.mask_logits, i, valid[i]))
        embeds, valid = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return embeds, valid

    def encode_boxes(
        self,
        visual: ClipImageEncoder,
        image: Tensor,
        masks: Tensor,
        boxes: Tensor,
        *,
        weights: Tensor | None = None,
        flipped: Tensor | None = None,
        mask_prompts: MaskPrompts | None = None,
    ) -> Tensor:
        """Embed what boxes show of one image's masks (mask_crop).

        Args:
            image: (3, H, W) normalised, without padding.
            masks: (V, H, W) bool.
            boxes: (V, 4) x0, y0, x1, y1 in whole pixels, x1 and y1 just outside; none is empty.
            weights: (V, H, W) in [0, 1], how much of the image stays; None: the masks.
            flipped: (V,) bool, crops that are mirrored; None: none.
            mask_prompts: in place of the patches that a mask leaves out.

        Returns:
            (V, D), not normalised.
        """
        weights = masks.float() if weights is None else weights
        found = []
        for rows in torch.arange(len(masks), device=image.device).split(self.chunk_size):
            crops = masked_crops(
                image,
                weights[rows],
                boxes[rows],
                size=self.size,
                fill=self.fill,
                align_corners=self.align_corners,
            )
            crops = _mirrored(crops, flipped, rows)
            if mask_prompts is None:
                found.append(visual(crops).image_embeds)
            else:
                crop_masks = _mirrored(resized_masks(masks[rows].float(), boxes[rows], size=self.size), flipped, rows)
                prompts = mask_prompts(crop_masks, visual.patch_size)
                found.append(visual(crops, prompts=prompts).image_embeds)
        return torch.cat(found) if found else torch.zeros(0, visual.embed_dim, device=image.device)

    def _encode_regions(
        self, visual: ClipImageEncoder, images: ImageBatch, mask_logits: Tensor, i: int, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        image, used = images.tensor[i : i + 1], valid.nonzero().flatten()
        found = [
            visual(region_images(image, mask_logits[i, rows][None].float(), style=self.style, size=self.size)[0])
            for rows in used.split(self.chunk_size)
            if len(rows)
        ]
        embeds = torch.cat([features.image_embeds for features in found]) if found else None
        return _spread(embeds, used, len(valid), visual.embed_dim), valid

    def _encode_boxes(
        self,
        visual: ClipImageEncoder,
        images: ImageBatch,
        mask_logits: Tensor,
        i: int,
        valid: Tensor,
        mask_prompts: MaskPrompts | None,
    ) -> tuple[Tensor, Tensor]:
        height, width = images.image_sizes[i]
        probs = F.interpolate(
            mask_logits[i : i + 1].float(), size=images.padded_size, mode="bilinear", align_corners=False
        )[0, :, :height, :width].sigmoid()
        masks = probs > self.threshold
        valid = valid & masks.flatten(1).any(dim=1)
        used = valid.nonzero().flatten()
        masks = masks[used]
        embeds = self.encode_boxes(
            visual,
            images.tensor[i, :, :height, :width],
            masks,
            expanded_boxes(bounding_boxes(masks), self.expand, (height, width)),
            weights=probs[used] if self.matting else None,
            mask_prompts=mask_prompts,
        )
        return _spread(embeds, used, len(valid), visual.embed_dim), valid


def _mirrored(maps: Tensor, flipped: Tensor | None, rows: Tensor) -> Tensor:
    """Maps (n, ..., W) of the rows (n,), those that are flipped (V,) from right to left."""
    if flipped is None:
        return maps
    chosen = flipped[rows].view(-1, *[1] * (maps.dim() - 1))
    return torch.where(chosen, maps.flip(-1), maps)


def _spread(embeds: Tensor | None, used: Tensor, total: int, dim: int) -> Tensor:
    """(total, D): the embeddings (n, D) in the rows ``used``, zeros elsewhere."""
    if embeds is None:
        return torch.zeros(total, dim, device=used.device)
    return embeds.new_zeros(total, dim).index_copy(0, used, embeds)
