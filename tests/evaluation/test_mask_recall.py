"""Class-agnostic recall: best IoU of each segment, by kind of class."""

import math

import numpy as np
import pytest
import torch

from ovseg_d2.evaluation.mask_recall import MaskRecall, mask_ious
from ovseg_d2.structures import Vocabulary

VOCABULARY = Vocabulary(names=("cat", "dog", "sky"), is_thing=(True, True, False), is_seen=(True, False, True))


def test_ious():
    masks = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    segments = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    torch.testing.assert_close(mask_ious(masks, segments), torch.tensor([[1 / 3, 0], [0, 0], [0.5, 0]]))


def test_by_hand():
    ids = np.array([[1, 1, 2, 2], [3, 3, 0, 9]])
    segments = [
        {"id": 1, "category_id": 0},
        {"id": 2, "category_id": 1},
        {"id": 3, "category_id": 2},
        {"id": 9, "category_id": 0, "iscrowd": 1},
    ]
    # Segment 1 is met with IoU 2/3 (void and crowd pixels do not count), 2 with 1/2, 3 not at all.
    masks = torch.tensor([[[1, 1, 1, 0], [0, 0, 1, 1]], [[0, 0, 0, 1], [0, 0, 0, 0]]], dtype=torch.bool)
    recall = MaskRecall(VOCABULARY)
    recall.update(masks, ids, segments)
    recall.update(torch.zeros(0, 2, 4, dtype=torch.bool), ids, segments[:1])
    assert recall.result() == pytest.approx(
        {
            "mean_best_iou": 100 * (2 / 3 + 1 / 2) / 4,
            "mean_best_iou_things": 100 * (2 / 3 + 1 / 2) / 3,
            "mean_best_iou_stuff": 0,
            "mean_best_iou_seen": 100 * (2 / 3) / 3,
            "mean_best_iou_unseen": 50,
            "recall_50": 25,
            "segments": 4,
        }
    )


def test_nothing_to_find():
    recall = MaskRecall(Vocabulary(names=("cat",), is_thing=(True,)))
    recall.update(torch.ones(2, 3, 3, dtype=torch.bool), np.zeros((3, 3), int), [])
    result = recall.result()
    assert math.isnan(result["mean_best_iou"]) and "mean_best_iou_seen" not in result
