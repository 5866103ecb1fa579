"""What tells CLIP of a region in MaskCLIP++'s training (arXiv 2412.11464, Table 2): masks, boxes or pixels of the
ground truth, or the masks of a generator that fit it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from ovseg_d2.structures import SegmentationTargets

PRIORS = ("masks", "boxes", "pixels", "matched")


@dataclass
class Regions:
    """Regions of N images on CLIP's grid.

    Attributes:
        masks: (N, Q, h, w) in [0, 1].
        class_ids: (N, Q) int64 in [0, K).
        valid: (N, Q) bool, False where a row only fills the batch.
    """

    masks: Tensor
    class_ids: Tensor
    valid: Tensor

    @property
    def visible(self) -> Tensor:
        """(N, Q) bool: masks that have not vanished on the grid."""
        return self.masks.flatten(2).amax(dim=-1) > 0 if self.masks.shape[1] else self.valid


def regions_on_grid(targets: Sequence[SegmentationTargets], grid: tuple[int, int]) -> Regions:
    """The masks of all images, bilinearly at the size of CLIP's features.

    Args:
        targets: masks (M, H, W), bool or in [0, 1], on the frame of CLIP's images.
        grid: (h, w).
    """
    # Image by image, so that no float copy of all masks is held at full size.
    masks = [_resized(target.masks, grid) for target in targets]
    num_rows = max(len(target) for target in targets)
    return Regions(
        masks=torch.stack([F.pad(one, (0, 0, 0, 0, 0, num_rows - len(one))) for one in masks]),
        class_ids=torch.stack([F.pad(target.class_ids, (0, num_rows - len(target))) for target in targets]),
        valid=torch.stack([torch.arange(num_rows, device=one.device) < len(one) for one in masks]),
    )


def on_frame(targets: Sequence[SegmentationTargets], size: tuple[int, int]) -> list[SegmentationTargets]:
    """The same masks where the batch is padded to another size: padding at the right and the bottom comes or goes."""
    return [
        SegmentationTargets(
            target.class_ids,
            F.pad(target.masks, (0, size[1] - target.masks.shape[-1], 0, size[0] - target.masks.shape[-2])),
        )
        for target in targets
    ]


def labelled_pixels(regions: Regions) -> tuple[Tensor, Tensor]:
    """The class of each position, that of the mask with the largest part in it.

    Returns:
        Class ids (N, h * w) int64, and (N, h * w) bool, whether masks cover more than half of the position.
    """
    if not regions.masks.shape[1]:
        nothing = torch.zeros_like(regions.masks.sum(dim=1).flatten(1))
        return nothing.long(), nothing.bool()
    share, row = regions.masks.flatten(2).max(dim=1)
    return regions.class_ids.gather(1, row), share > 0.5


def boxes_of(targets: Sequence[SegmentationTargets]) -> list[SegmentationTargets]:
    """The same with the smallest upright rectangle around each mask in its place."""
    return [SegmentationTargets(target.class_ids, _filled(target.masks)) for target in targets]


def matched_masks(
    targets: Sequence[SegmentationTargets], mask_probs: Tensor, valid: Tensor | None = None
) -> list[SegmentationTargets]:
    """The same with a generator's masks in place of the true ones: pairs with the largest sum of IoUs. True masks that
    no generated one touches are left out.

    Args:
        mask_probs: (N, Q, H, W) in [0, 1].
        valid: (N, Q) bool; None if all are.
    """
    matched = []
    for i, (target, probs) in enumerate(zip(targets, mask_probs, strict=True)):
        probs = probs if valid is None else probs[valid[i]]
        found, wanted = (probs > 0.5).flatten(1).float(), target.masks.flatten(1).float()
        with torch.autocast(found.device.type, enabled=False):  # areas are beyond half precision
            intersection = found @ wanted.T
        ious = intersection / (found.sum(1)[:, None] + wanted.sum(1) - intersection).clamp(min=1)
        rows, columns = (torch.as_tensor(x, device=ious.device) for x in linear_sum_assignment(-ious.cpu().numpy()))
        touching = ious[rows, columns] > 0
        rows, columns = rows[touching], columns[touching]
        matched.append(SegmentationTargets(target.class_ids[columns], probs[rows]))
    return matched


def _resized(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """(M, H, W) -> (M, h, w) float32."""
    return F.interpolate(masks[:, None].float(), size=grid, mode="bilinear", align_corners=False)[:, 0]


def _filled(masks: Tensor) -> Tensor:
    """Masks (M, H, W) bool -> their boxes (M, H, W) bool."""
    spans = [_span(masks.any(dim=2)), _span(masks.any(dim=1))]
    return spans[0][:, :, None] & spans[1][:, None, :]


def _span(occupied: Tensor) -> Tensor:
    """(M, L) bool: all from the first to the last."""
    after_first = occupied.int().cummax(dim=1).values
    before_last = occupied.int().flip(1).cummax(dim=1).values.flip(1)
    return (after_first & before_last).bool()
