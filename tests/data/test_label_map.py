"""Label maps on their own (the mapper's tests look at them through pictures)."""

from __future__ import annotations

import numpy as np
import pytest

from ovseg_d2.data.augmentation import encode_rgb_ids
from ovseg_d2.data.label_map import LabelMap


def test_panoptic() -> None:
    ids = np.array([[0, 9, 9, 70_000], [4, 4, 5, 70_000]])
    segments = [
        {"id": 70_000, "category_id": 2},
        {"id": 4, "category_id": 0, "iscrowd": 1},
        {"id": 9, "category_id": 2, "iscrowd": 0},
        {"id": 123, "category_id": 1},  # not in the picture
    ]
    labels = LabelMap.from_panoptic(encode_rgb_ids(ids), segments)
    assert labels.sem_seg(99).tolist() == [[99, 2, 2, 2], [0, 0, 99, 2]]
    class_ids, masks = labels.targets(keep_empty=False)
    assert class_ids.tolist() == [2, 2]
    assert masks.int().tolist() == [[[0, 0, 0, 1], [0, 0, 0, 1]], [[0, 1, 1, 0], [0, 0, 0, 0]]]

    class_ids, masks = labels.targets(keep_empty=True)
    assert class_ids.tolist() == [2, 2, 1] and masks.sum((1, 2)).tolist() == [2, 2, 0]

    class_ids, masks = labels.by_class(3).targets(keep_empty=False)
    assert class_ids.tolist() == [0, 2]
    assert masks.int().tolist() == [[[0, 0, 0, 0], [1, 1, 0, 0]], [[0, 1, 1, 1], [0, 0, 0, 1]]]


def test_no_segments() -> None:
    class_ids, masks = LabelMap.from_panoptic(np.zeros((3, 4, 3), np.uint8), []).targets(keep_empty=False)
    assert tuple(class_ids.shape) == (0,) and tuple(masks.shape) == (0, 3, 4)


@pytest.mark.parametrize("count", [253, 254, 255, 256, 700])
def test_many_segments(count: int) -> None:
    """Beyond one byte of indices."""
    ids = np.arange(count)[None] * 77 + 1
    segments = [{"id": int(i), "category_id": k} for k, i in enumerate(ids[0])]
    labels = LabelMap.from_panoptic(encode_rgb_ids(ids), segments)
    assert labels.sem_seg(-1).tolist() == [list(range(count))]
    assert labels.targets(keep_empty=False)[1].int().sum() == count


@pytest.mark.parametrize(
    ("labels", "num_classes", "ignore_label", "expected"),
    [
        ([[0, 1, 255]], 2, 255, [[0, 1, -1]]),
        ([[0, 846, 65_535]], 847, 65_535, [[0, 846, -1]]),
        ([[0, 64, 65]], 65, 65, [[0, 64, -1]]),
        ([[0, 1, 0]], 2, None, [[0, 1, 0]]),
        ([[0, 2, 1]], 3, 1, [[0, 2, -1]]),  # an ignore label within the table
    ],
)
def test_semantic(labels: list, num_classes: int, ignore_label: int | None, expected: list) -> None:
    label_map = LabelMap.from_semantic(np.array(labels, np.uint16), num_classes, ignore_label)
    assert label_map.sem_seg(-1).tolist() == expected


@pytest.mark.parametrize(("value", "ignore_label"), [(7, 255), (255, None), (300, 65_535)])
def test_label_outside_the_table(value: int, ignore_label: int | None) -> None:
    ignored = "" if ignore_label is None else f" or the ignore label {ignore_label}"
    with pytest.raises(ValueError, match=rf"label {value} \(1 pixel\), expected 0..2{ignored}$"):
        LabelMap.from_semantic(np.array([[0, value]]), 3, ignore_label)
