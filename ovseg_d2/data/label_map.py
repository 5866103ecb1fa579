"""Panoptic and semantic labels of one image, in a form that transforms and target masks are cheap for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from fvcore.transforms.transform import TransformList

from ovseg_d2.data.augmentation import decode_rgb_ids, transform_labels
from ovseg_d2.data.label_files import labelled_pixels

Array = np.ndarray


@dataclass(frozen=True)
class LabelMap:
    """Every pixel names one of n regions, or none.

    Small indices instead of segment ids make one byte a pixel of most images, which is what resizing, comparing and
    look-up tables are fast on.

    Attributes:
        index: (H, W) integers in [0, n]; 0 where there is no label, i for region i - 1.
        class_ids: (n,) int64, the class of each region.
        is_target: (n,) bool, whether the region is a target mask (crowds are not).
    """

    index: Array
    class_ids: Array
    is_target: Array

    @classmethod
    def from_panoptic(cls, rgb: Array, segments_info: Sequence[dict[str, Any]]) -> LabelMap:
        """From a panoptic PNG (H, W, 3) uint8 and its segments; ids that no segment has are no label."""
        segment_ids = np.array([segment["id"] for segment in segments_info], np.int64)
        return cls(
            index=_positions(decode_rgb_ids(rgb), segment_ids),
            class_ids=np.array([segment["category_id"] for segment in segments_info], np.int64),
            is_target=np.array([not segment.get("iscrowd", 0) for segment in segments_info], bool),
        )

    @classmethod
    def from_semantic(
        cls, labels: Array, num_classes: int, ignore_label: int | None, class_of_label: Array | None = None
    ) -> LabelMap:
        """From class indices (H, W) with ``ignore_label`` for none; a region a class of the table.

        With ``class_of_label`` (see :func:`class_of_label`) the file's labels are other than the classes.

        Raises:
            ValueError: a label outside the table (the caller knows the file's name).
        """
        labels = labels.astype(np.int32, copy=False)
        num_labels = num_classes if class_of_label is None else len(class_of_label)
        index = np.where(labelled_pixels(labels, num_labels, ignore_label), labels + 1, 0)
        if class_of_label is not None:
            index = np.append(0, class_of_label + 1)[index]
        return cls._of_classes(index, num_classes)

    @classmethod
    def _of_classes(cls, index: Array, num_classes: int) -> LabelMap:
        return cls(index=index, class_ids=np.arange(num_classes), is_target=np.ones(num_classes, bool))

    def by_class(self, num_classes: int) -> LabelMap:
        """All regions of a class made one, crowds too."""
        return self._of_classes(np.append(0, self.class_ids + 1)[self.index], num_classes)

    def present(self) -> LabelMap:
        """Regions without a pixel are no targets any more."""
        return replace(self, is_target=self.is_target & (self._sizes() > 0))

    def transformed(self, transforms: TransformList) -> LabelMap:
        """The labels after geometric transforms of the image; no label in the padding."""
        return replace(self, index=transform_labels(self.index, transforms, fill=0))

    def sem_seg(self, ignore_value: int) -> torch.Tensor:
        """Classes (H, W) int64, ``ignore_value`` where there is no label."""
        return torch.from_numpy(np.append(ignore_value, self.class_ids)[self.index])

    def targets(self, *, keep_empty: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """``class_ids`` (M,) int64 and ``masks`` (M, H, W) bool of the targets, or of those that have a pixel."""
        regions = np.flatnonzero(self.is_target & (keep_empty | (self._sizes() > 0)))
        index = torch.from_numpy(self.index)
        masks = index[None] == torch.from_numpy(regions + 1).to(index.dtype)[:, None, None]
        return torch.from_numpy(self.class_ids[regions]), masks

    def _sizes(self) -> Array:
        """Pixels of each region, (n,)."""
        return np.bincount(self.index.ravel(), minlength=len(self.class_ids) + 1)[1:]


def class_of_label(metadata: Any) -> Array | None:
    """The class in [0, K) of every label of a dataset's semantic files, -1 for labels without one; (labels,) int64.

    None where labels are the classes themselves. A zero-shot view of a dataset reads the files of all its classes, and
    its metadata says in ``semantic_label_ids`` which label each of its own K classes has among them (or the first of
    them, if others have none), and in ``semantic_num_labels`` how many labels there are.
    """
    label_ids = getattr(metadata, "semantic_label_ids", None)
    if label_ids is None:
        return None
    table = np.full(metadata.semantic_num_labels, -1, np.int64)
    table[list(label_ids)] = np.arange(len(label_ids))
    return table


def _positions(values: Array, known: Array) -> Array:
    """1 + position in ``known`` (n,) of each of ``values`` (H, W), 0 for values that are not there."""
    if not len(known):
        return np.zeros(values.shape, np.uint8)
    order = np.argsort(known)
    place = np.minimum(np.searchsorted(known, values, sorter=order), len(known) - 1)
    position = order[place]
    return np.where(known[position] == values, position + 1, 0).astype(np.uint8 if len(known) < 255 else np.int32)
