"""The annotation of one image: its label file, or the masks of its instances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import polygons_to_bitmask
from fvcore.transforms.transform import TransformList
from torch import Tensor

from ovseg_d2.data.check import require_registered
from ovseg_d2.data.image_io import annotated_size, check_size, read_image
from ovseg_d2.data.label_map import LabelMap, class_of_label
from ovseg_d2.data.vocabulary import vocabulary_from_metadata

Array = np.ndarray
#: What annotations can be read as; the first that a record has says most of its image.
TARGETS = ("panoptic", "semantic", "instance")
_KEYS = {"panoptic": "pan_seg_file_name", "semantic": "sem_seg_file_name", "instance": "annotations"}


@dataclass(frozen=True)
class DatasetInfo:
    """What reading annotations takes: the dataset's number of classes, the label of unlabelled pixels, and the class of
    each label where the two differ (:func:`ovseg_d2.data.label_map.class_of_label`)."""

    num_classes: int
    ignore_label: int | None
    class_of_label: Array | None = None

    @classmethod
    def from_name(cls, name: str) -> DatasetInfo:
        require_registered(name)
        metadata = MetadataCatalog.get(name)
        return cls(
            num_classes=len(vocabulary_from_metadata(metadata)),
            ignore_label=getattr(metadata, "ignore_label", None),
            class_of_label=class_of_label(metadata),
        )


def with_size(record: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The record with the (height, width) of its image.

    Raises:
        ValueError: its annotation file says otherwise.
    """
    check_size(record["file_name"], size, annotated_size(record) or size, "its annotation file")
    return {**record, "height": size[0], "width": size[1]}


def annotation_key(record: dict[str, Any], targets: str) -> str:
    """The key that the annotation for ``targets`` should be at."""
    # The semantic labels of a panoptic dataset are in its panoptic files.
    if targets == "semantic" and _KEYS["panoptic"] in record:
        return _KEYS["panoptic"]
    return _KEYS[targets]


def best_targets(record: dict[str, Any]) -> str | None:
    """The first of ``TARGETS`` that the record has the annotation for; None if it has none."""
    return next((targets for targets in TARGETS if _KEYS[targets] in record), None)


def read_labels(record: dict[str, Any], info: DatasetInfo, targets: str) -> LabelMap:
    """The label file of a record, for panoptic or semantic targets.

    Raises:
        ValueError: the file is not of the size of the image, or holds other than labels of the dataset.
    """
    key = annotation_key(record, targets)
    path = record[key]
    labels = read_image(path)
    check_size(path, labels.shape[:2], (record["height"], record["width"]), f"the image {record['file_name']}")
    channels = 1 if labels.ndim == 2 else labels.shape[2]
    if key == _KEYS["panoptic"]:
        if channels < 3:
            raise ValueError(f"{path} has {channels} channel(s), expected the 3 of a panoptic PNG (RGB ids)")
        label_map = LabelMap.from_panoptic(labels, record["segments_info"])
        return label_map if targets == "panoptic" else label_map.by_class(info.num_classes)
    if channels != 1:
        raise ValueError(f"{path} has {channels} channels, expected 1 of class indices")
    try:
        return LabelMap.from_semantic(labels, info.num_classes, info.ignore_label, info.class_of_label)
    except ValueError as error:
        raise ValueError(f"{path} has {error} of {record['dataset_name']!r}") from None


def instance_masks(
    record: dict[str, Any], info: DatasetInfo, transforms: TransformList, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """``class_ids`` (M,) int64 and ``masks`` (M, H, W) bool of the objects that are no crowd, after the transforms.

    Args:
        size: (height, width) of the transformed image.

    Raises:
        ValueError: a category that the dataset lacks, or a mask that is not of the size of the image.
    """
    annotations = [annotation for annotation in record["annotations"] if not annotation.get("iscrowd", 0)]
    masks = np.zeros((len(annotations), *size), bool)
    for mask, annotation in zip(masks, annotations, strict=True):
        mask[:] = _transformed_mask(record, annotation, transforms, size)
    class_ids = torch.tensor([annotation["category_id"] for annotation in annotations], dtype=torch.int64)
    if len(class_ids) and not 0 <= int(class_ids.min()) <= int(class_ids.max()) < info.num_classes:
        raise ValueError(
            f"an annotation of {record['file_name']} has category {int(class_ids.max())}, expected "
            f"0..{info.num_classes - 1} in dataset {record['dataset_name']!r}"
        )
    return class_ids, torch.from_numpy(masks)


def _transformed_mask(
    record: dict[str, Any], annotation: dict[str, Any], transforms: TransformList, size: tuple[int, int]
) -> Array:
    """The mask (H, W) bool of polygons, of a (compressed or plain) RLE or of a bitmap."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list):
        # Corners move exactly; points beyond the border are clipped when the polygon is filled.
        polygons = [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in segmentation]
        corners = [transforms.apply_coords(polygon.copy()).reshape(-1) for polygon in polygons]
        return polygons_to_bitmask(corners, *size)
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
        mask = mask_util.decode(segmentation)
    elif isinstance(segmentation, np.ndarray):
        mask = segmentation.astype(np.uint8)
    else:
        raise ValueError(
            f"an annotation of {record['file_name']} has a segmentation of type {type(segmentation).__name__}, "
            "expected polygons (list), RLE (dict) or a bitmap (array)"
        )
    expected = (record["height"], record["width"])
    check_size(f"a mask of {record['file_name']}", mask.shape[:2], expected, "the image")
    return np.asarray(transforms.apply_segmentation(mask)) == 1  # padding is 255
