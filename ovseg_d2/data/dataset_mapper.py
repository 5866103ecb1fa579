"""The mapper: a dataset dict -> an image with its targets, for semantic, panoptic and instance segmentation."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances

from ovseg_d2.data.annotation_masks import annotation_segments
from ovseg_d2.data.annotations import (
    TARGETS,
    DatasetInfo,
    annotation_key,
    instance_masks,
    read_labels,
    with_size,
)
from ovseg_d2.data.augmentation import build_augmentations, build_test_augmentations, transform_masks
from ovseg_d2.data.image_io import CorruptImageError, read_image
from ovseg_d2.data.label_map import LabelMap
from ovseg_d2.data.proposal_files import ProposalReader, proposal_path

Array = np.ndarray
_logger = logging.getLogger(__name__)


class OVSegDatasetMapper:
    """Reads an image and its annotation, augments both alike and makes the targets.

    In training the result has ``image`` (3, H, W) uint8, ``instances`` (``gt_classes`` (M,) int64 and ``gt_masks``
    BitMasks (M, H, W)), and for panoptic and semantic targets ``sem_seg`` (H, W) int64. One instance is

    * panoptic: a segment that is no crowd,
    * semantic: a class that is present,
    * instance: an annotated object that is no crowd.

    ``proposals`` (Q, H, W) bool are added in training and in evaluation if there are files of them.

    Segments and objects that the crop removed wholly keep an empty mask, or are dropped (``keep_empty_masks``).
    Unlabelled, ignored and padded pixels are ``ignore_value`` in ``sem_seg``
    whatever a dataset's own ignore label is, and in no mask.

    In evaluation the result is the dict itself with ``image`` added, and with ``annotated_proposals`` the masks of the
    annotation, see :func:`ovseg_d2.data.annotation_masks.annotation_segments`: ``proposals`` and their classes
    ``proposal_classes`` (Q,) int64.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: Sequence[T.Augmentation],
        image_format: str,
        targets: str,
        ignore_value: int,
        keep_empty_masks: bool,
        datasets: Mapping[str, DatasetInfo],
        on_corrupt_image: str,
        proposals: Mapping[str, ProposalReader] | None = None,
        annotated_proposals: bool = False,
    ) -> None:
        """
        Args:
            is_train: whether targets are made.
            augmentations: applied in order, to the image and to all labels.
            image_format: RGB or BGR.
            targets: panoptic, semantic or instance.
            ignore_value: label of pixels without a class in ``sem_seg``.
            keep_empty_masks: whether what the crop removed stays a panoptic or instance target.
            datasets: what is known of each dataset that a dict's ``dataset_name`` may name.
            on_corrupt_image: "skip" (log, count and return None) or "raise".
            proposals: files of mask proposals by dataset; None: dicts get none.
            annotated_proposals: in evaluation, the masks of the annotation are the proposals.
        """
        if targets not in TARGETS:
            raise ValueError(f"INPUT.TARGETS is {targets!r}; expected one of {', '.join(TARGETS)}")
        if on_corrupt_image not in ("skip", "raise"):
            key = f"{'DATALOADER' if is_train else 'TEST'}.ON_CORRUPT_IMAGE"
            raise ValueError(f"{key} is {on_corrupt_image!r}; expected skip or raise")
        for name, info in datasets.items():
            if is_train and targets != "instance" and 0 <= ignore_value < info.num_classes:
                raise ValueError(
                    f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {ignore_value}, a class of dataset {name!r}; expected a "
                    f"value outside 0..{info.num_classes - 1}"
                )
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.targets = targets
        self.ignore_value = ignore_value
        self.keep_empty_masks = keep_empty_masks
        self.datasets = dict(datasets)
        self.on_corrupt_image = on_corrupt_image
        self.proposals = None if proposals is None else dict(proposals)
        self.annotated_proposals = annotated_proposals
        # Only a crop that limits the share of a class needs the labels to choose its transform.
        self._augmentations_see_labels = any(
            getattr(augmentation, "single_category_max_area", 1.0) < 1.0 for augmentation in augmentations
        )
        self._num_skipped = multiprocessing.Value("q", 0)

    @classmethod
    def from_config(
        cls, cfg: Any, is_train: bool = True, dataset_names: str | Sequence[str] | None = None
    ) -> dict[str, Any]:
        if dataset_names is None:
            dataset_names = cfg.DATASETS.TRAIN if is_train else cfg.DATASETS.TEST
        elif isinstance(dataset_names, str):
            dataset_names = (dataset_names,)
        annotated = cfg.MODEL.OVSEG.PROPOSALS.NAME == "GroundTruthProposals"
        files = "" if annotated else cfg.MODEL.OVSEG.PROPOSALS.FILES
        return {
            "is_train": is_train,
            "augmentations": build_augmentations(cfg) if is_train else build_test_augmentations(cfg),
            "image_format": cfg.INPUT.FORMAT,
            "targets": cfg.INPUT.TARGETS,
            "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "keep_empty_masks": cfg.INPUT.KEEP_EMPTY_MASKS,
            "datasets": {name: DatasetInfo.from_name(name) for name in dataset_names},
            "on_corrupt_image": (cfg.DATALOADER if is_train else cfg.TEST).ON_CORRUPT_IMAGE,
            "proposals": {name: ProposalReader(proposal_path(files, name)) for name in dataset_names}
            if files
            else None,
            "annotated_proposals": annotated,
        }

    @property
    def num_skipped(self) -> int:
        """Number of corrupt images that were skipped, over all worker processes of this loader."""
        return self._num_skipped.value

    def reset_num_skipped(self) -> None:
        """Start counting again."""
        self._num_skipped.value = 0

    def __call__(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """Map one dataset dict (left unchanged); None for a corrupt image that is to be skipped."""
        try:
            return self._map(record)
        except CorruptImageError as error:
            if self.on_corrupt_image == "raise":
                raise
            with self._num_skipped.get_lock():
                self._num_skipped.value += 1
            _logger.warning("skipped: %s", error)
            return None

    def _map(self, record: dict[str, Any]) -> dict[str, Any]:
        path = record["file_name"]
        image = read_image(path, self.image_format)
        size = image.shape[:2]
        record = with_size(record, size)
        record.setdefault("image_id", os.path.splitext(os.path.basename(path))[0])

        labels = self._read_labels(record) if self.is_train else None
        image, transforms = self._augment(image, labels)
        record["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if self.is_train:
            self._add_targets(record, labels, transforms)
        elif self.annotated_proposals:
            class_ids, masks = annotation_segments(record, self._info(record), transforms, self._size(record))
            record.update(proposals=masks, proposal_classes=class_ids)
        if self.proposals is not None:
            reader = self.proposals[record["dataset_name"]]
            masks = reader.masks(record["image_id"], size, name=path)
            record["proposals"] = torch.from_numpy(transform_masks(masks, transforms))
        return record

    def _info(self, record: dict[str, Any]) -> DatasetInfo:
        return self.datasets[record["dataset_name"]]

    @staticmethod
    def _size(record: dict[str, Any]) -> tuple[int, int]:
        """Of the transformed image."""
        return tuple(record["image"].shape[1:])

    def _read_labels(self, record: dict[str, Any]) -> LabelMap | None:
        """The label file of the record; None for instance targets, whose masks are in the record itself."""
        key = annotation_key(record, self.targets)
        if key not in record:
            raise ValueError(
                f"INPUT.TARGETS is {self.targets!r}, but {record['file_name']} of dataset {record['dataset_name']!r} "
                f"has no {key}; expected a dataset with {self.targets} annotations"
            )
        return None if self.targets == "instance" else read_labels(record, self._info(record), self.targets)

    def _augment(self, image: Array, labels: LabelMap | None) -> tuple[Array, T.TransformList]:
        sem_seg = None
        if self._augmentations_see_labels:
            if labels is None:
                raise ValueError(
                    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA is below 1, which needs semantic labels; "
                    "expected INPUT.TARGETS panoptic or semantic"
                )
            # Only to choose the crop: the targets are transformed more exactly (see `transform_labels`).
            sem_seg = labels.sem_seg(self.ignore_value).numpy().astype(np.float64)
        augmented = T.AugInput(image, sem_seg=sem_seg)
        transforms = self.augmentations(augmented)
        return augmented.image, transforms

    def _add_targets(self, record: dict[str, Any], labels: LabelMap | None, transforms: T.TransformList) -> None:
        size = self._size(record)
        if labels is None:
            class_ids, masks = instance_masks(record, self._info(record), transforms, size)
            present = self.keep_empty_masks | masks.any(dim=(1, 2))
            class_ids, masks = class_ids[present], masks[present]
        else:
            labels = labels.transformed(transforms)
            record["sem_seg"] = labels.sem_seg(self.ignore_value)
            # Semantic targets are the classes that are present.
            keep_empty = self.keep_empty_masks and self.targets == "panoptic"
            class_ids, masks = labels.targets(keep_empty=keep_empty)
        instances = Instances(size)
        instances.gt_classes = class_ids
        instances.gt_masks = BitMasks(masks)
        record["instances"] = instances
