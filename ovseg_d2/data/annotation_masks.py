"""The masks of an annotation as mask proposals: perfect ones, or class-agnostic ones such as SAM would give."""

from __future__ import annotations

from typing import Any

import numpy as np
from fvcore.transforms.transform import NoOpTransform, TransformList
from scipy import ndimage
from torch import Tensor

from ovseg_d2.data.annotations import DatasetInfo, best_targets, instance_masks, read_labels, with_size
from ovseg_d2.data.augmentation import decode_rgb_ids
from ovseg_d2.data.image_io import read_image

Array = np.ndarray
KINDS = ("segments", "regions")
_WITH_CORNERS = np.ones((3, 3), bool)


def annotation_segments(
    record: dict[str, Any], info: DatasetInfo, transforms: TransformList, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The segments of an image's annotation: ``class_ids`` (Q,) int64 and ``masks`` (Q, H, W) bool; Q may be 0.

    They are the panoptic segments that are no crowd; in a dataset without them, the classes that are present; else the
    instances that are no crowd. What the transforms leave no pixel of keeps an empty mask.

    Args:
        record: a dict of a registered dataset with the ``height`` and ``width`` of its image.
        info: what is known of the dataset.
        transforms: what the image went through.
        size: (height, width) after it.

    Raises:
        ValueError: the record has no annotation, or one that is not of its image.
    """
    targets = _required_targets(record, "segments")
    if targets == "instance":
        return instance_masks(record, info, transforms, size)
    return read_labels(record, info, targets).present().transformed(transforms).targets(keep_empty=True)


def annotation_masks(record: dict[str, Any], info: DatasetInfo, kind: str) -> Array:
    """Masks (Q, H, W) bool of an image's annotation, none of them empty; Q may be 0.

    "segments" are those of :func:`annotation_segments`, at the size of the image.

    "regions" know nothing of classes: every connected part (corners connect) of a segment, or of a semantic label. All
    that the file labels counts, crowds and what the dataset's table leaves out, such as unseen classes, too.

    Args:
        record: a dict of a registered dataset.
        info: what is known of the dataset.
        kind: "segments" or "regions".

    Raises:
        ValueError: another kind, or the record has no annotation that it can be made of.
    """
    if kind not in KINDS:
        raise ValueError(f"masks from annotations: got {kind!r}; allowed are {', '.join(KINDS)}")
    targets = _required_targets(record, kind)
    if kind == "segments":
        size = read_image(record["file_name"], "RGB").shape[:2]
        unchanged = TransformList([NoOpTransform()])
        masks = annotation_segments(with_size(record, size), info, unchanged, size)[1].numpy()
        return masks[masks.any(axis=(1, 2))]
    if targets == "panoptic":
        return connected_regions(decode_rgb_ids(read_image(record["pan_seg_file_name"])), unlabelled=0)
    return connected_regions(read_image(record["sem_seg_file_name"]), unlabelled=info.ignore_label)


def connected_regions(labels: Array, *, unlabelled: int | None) -> Array:
    """Masks (Q, H, W) bool of the connected parts of labels (H, W), value by value; not of ``unlabelled``."""
    masks = [np.zeros((0, *labels.shape), bool)]
    for value in np.unique(labels):
        if value != unlabelled:
            parts, count = ndimage.label(labels == value, structure=_WITH_CORNERS)
            masks.append(parts == np.arange(1, count + 1)[:, None, None])
    return np.concatenate(masks)


def _required_targets(record: dict[str, Any], kind: str) -> str:
    targets = best_targets(record)
    if targets is None or (kind == "regions" and targets == "instance"):
        needed = ["pan_seg_file_name", "sem_seg_file_name", "annotations"][: 3 if kind == "segments" else 2]
        raise ValueError(f"{record['file_name']} has no {' and no '.join(needed)}, which {kind} are made of")
    return targets
