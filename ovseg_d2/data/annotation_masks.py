"""The masks of an annotation as mask proposals: perfect ones, or class-agnostic ones such as SAM would give."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import ndimage

from ovseg_d2.data.augmentation import decode_rgb_ids
from ovseg_d2.data.dataset_mapper import DatasetInfo, OVSegDatasetMapper
from ovseg_d2.data.image_io import read_image

Array = np.ndarray
KINDS = ("segments", "regions")
#: The file of each kind of target, the best first.
_FILES = {"panoptic": "pan_seg_file_name", "semantic": "sem_seg_file_name", "instance": "annotations"}
_WITH_CORNERS = np.ones((3, 3), bool)


def annotation_masks(record: dict[str, Any], info: DatasetInfo, kind: str) -> Array:
    """Masks (Q, H, W) bool of an image's annotation; Q may be 0.

    "segments" are what training would learn: the panoptic segments that are no crowd; in a dataset without them, the
    classes that are present; else the instances.

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
    targets = next((target for target, key in _FILES.items() if key in record), None)
    if targets is None or (kind == "regions" and targets == "instance"):
        needed = list(_FILES.values())[: 3 if kind == "segments" else 2]
        raise ValueError(f"{record['file_name']} has no {' and no '.join(needed)}, which {kind} are made of")
    if kind == "segments":
        return _segments(record, info, targets)
    labels = read_image(record[_FILES[targets]])
    if targets == "panoptic":
        return connected_regions(decode_rgb_ids(labels), unlabelled=0)
    return connected_regions(labels, unlabelled=info.ignore_label)


def connected_regions(labels: Array, *, unlabelled: int | None) -> Array:
    """Masks (Q, H, W) bool of the connected parts of labels (H, W), value by value; not of ``unlabelled``."""
    masks = [np.zeros((0, *labels.shape), bool)]
    for value in np.unique(labels):
        if value != unlabelled:
            parts, count = ndimage.label(labels == value, structure=_WITH_CORNERS)
            masks.append(parts == np.arange(1, count + 1)[:, None, None])
    return np.concatenate(masks)


def _segments(record: dict[str, Any], info: DatasetInfo, targets: str) -> Array:
    """The masks that a training on the image as it is would have."""
    mapper = OVSegDatasetMapper(
        is_train=True,
        augmentations=(),
        image_format="RGB",
        targets=targets,
        ignore_value=-1,
        keep_empty_masks=False,
        datasets={record["dataset_name"]: info},
        on_corrupt_image="raise",
    )
    return mapper(record)["instances"].gt_masks.tensor.numpy()
