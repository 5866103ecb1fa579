"""Cases of region crops: ZegFormer's, and those of ZSSeg, FreeSeg and OVSeg."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.structures import ImageList

from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from ovseg_d2.modeling.layers.boxes import bounding_boxes
from ovseg_d2.modeling.mask_classification.crops import expanded_boxes, masked_crops, region_images, resized_masks
from tests.parity import Case

SIZE = 224
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_PIXEL_MEAN, CLIP_PIXEL_STD))


def samples(name: str, crops: torch.Tensor) -> dict[str, Any]:
    """What is recorded of crops (..., 3, 224, 224)."""
    return {
        f"{name}_sub": crops[..., 3::7, 3::7],
        f"{name}_mean": crops.mean((-2, -1)),
        f"{name}_sqmean": crops.square().mean((-2, -1)),
    }


@torch.no_grad()
def zegformer(case: Case) -> dict[str, Any]:
    normalised = [(image - MEAN) / STD for image in case.indexed("image_{}")]
    images = ImageList.from_tensors(normalised, case.meta["size_divisibility"]).tensor
    outputs: dict[str, Any] = {}
    for style in ("crop", "mask", "cropmask"):
        outputs |= samples(style, region_images(images, case.inputs["pred_mask_logits"], style=style, size=SIZE))
    return outputs


@torch.no_grad()
def boxes(case: Case) -> dict[str, Any]:
    meta, image, probs = case.meta, (case.inputs["image"] - MEAN) / STD, case.inputs["mask_probs"]
    masks = probs > meta["mask_thr"]
    valid = masks.flatten(1).any(dim=1)
    found = expanded_boxes(bounding_boxes(masks[valid]), meta["mask_expand_ratio"], tuple(image.shape[1:]))
    crops = masked_crops(
        image,
        (probs if meta["mask_matting"] else masks.float())[valid],
        found,
        size=SIZE,
        fill=-MEAN / STD if meta["mask_fill"] == "zero" else 0.0,
        align_corners="align_corners=True" in meta["resize"],
    )
    outputs = {"valid": valid, "boxes": bounding_boxes(masks[valid]), **samples("regions", crops)}
    if "region_masks_sub" in case.expected:
        region_masks = resized_masks(masks[valid].float(), found, size=SIZE)
        outputs["region_masks_sub"] = region_masks[:, None, 3::7, 3::7]
    return outputs


TOPICS = {
    "maft/crop_merge": zegformer,
    "maft/crop_merge_zsseg": boxes,
    "maft/crop_merge_freeseg": boxes,
    "maft/crop_merge_ovseg": boxes,
}
