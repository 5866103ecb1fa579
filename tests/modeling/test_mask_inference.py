"""Semantic, panoptic and instance results from masks that can be worked out by hand."""

import pytest
import torch

from ovseg_d2.modeling.inference.mask_inference import (
    MaskInference,
    instance_inference,
    panoptic_inference,
    semantic_inference,
)
from ovseg_d2.modeling.layers.boxes import bounding_boxes


def logits_of(masks, height=20.0):
    return torch.where(torch.as_tensor(masks).bool(), height, -height)


def class_probs_of(labels, num_classes, prob=0.9):
    """Rows that give ``prob`` to the label and share the rest; the last column is "no object"."""
    rest = (1 - prob) / num_classes
    probs = torch.full((len(labels), num_classes + 1), rest)
    probs[torch.arange(len(labels)), torch.tensor(labels)] = prob
    return probs


LEFT = [[1, 1, 0, 0], [1, 1, 0, 0]]
RIGHT = [[0, 0, 1, 1], [0, 0, 1, 1]]
CORNER = [[0, 0, 0, 1], [0, 0, 0, 0]]
IS_THING = torch.tensor([True, False, False])


def panoptic(labels, masks, prob=0.9, object_mask_threshold=0.5, overlap_threshold=0.8):
    return panoptic_inference(
        class_probs_of(labels, 3, prob),
        logits_of(masks),
        is_thing=IS_THING,
        object_mask_threshold=object_mask_threshold,
        overlap_threshold=overlap_threshold,
    )


def test_semantic_is_the_sum_over_queries():
    scores = semantic_inference(class_probs_of([0, 1], 3), logits_of([LEFT, RIGHT]))
    expected = torch.full((3, 2, 4), 0.1 / 3)
    expected[0, :, :2] = 0.9
    expected[1, :, 2:] = 0.9
    torch.testing.assert_close(scores, expected)


def test_panoptic_ids_and_categories():
    ids, segments = panoptic([0, 1], [LEFT, RIGHT])
    assert ids.dtype == torch.int32 and ids.tolist() == [[1, 1, 2, 2]] * 2
    assert segments == [
        {"id": 1, "isthing": True, "category_id": 0},
        {"id": 2, "isthing": False, "category_id": 1},
    ]


def test_panoptic_merges_stuff_but_not_things():
    ids, segments = panoptic([1, 1], [LEFT, RIGHT])
    assert ids.unique().tolist() == [1] and len(segments) == 1
    ids, segments = panoptic([0, 0], [LEFT, RIGHT])
    assert ids.unique().tolist() == [1, 2] and len(segments) == 2


def test_panoptic_drops_weak_no_object_and_covered_queries():
    ids, segments = panoptic([0, 3], [LEFT, RIGHT])
    assert ids.tolist() == [[1, 1, 0, 0]] * 2 and len(segments) == 1
    ids, segments = panoptic([0, 1], [LEFT, RIGHT], object_mask_threshold=0.95)
    assert ids.eq(0).all() and segments == []
    # The first query wins its corner of the second one's mask, which keeps 3 of 4 pixels: below 0.8.
    ids, segments = panoptic_inference(
        torch.cat([class_probs_of([0], 3, 0.95), class_probs_of([1], 3, 0.9)]),
        logits_of([CORNER, RIGHT]),
        is_thing=IS_THING,
        object_mask_threshold=0.5,
        overlap_threshold=0.8,
    )
    assert ids.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]] and [s["category_id"] for s in segments] == [0]


def test_instance_scores_and_boxes():
    logits = torch.stack([logits_of(LEFT), torch.where(torch.tensor(CORNER).bool(), 1.0, -20.0)])
    result = instance_inference(class_probs_of([0, 1], 3), logits, is_thing=IS_THING, top_k=6)
    assert result.pred_classes.tolist() == [0, 0] and result.image_size == (2, 4)
    sigmoid_of_one = torch.tensor(1.0).sigmoid()
    torch.testing.assert_close(result.scores, torch.tensor([0.9, 0.1 / 3 * sigmoid_of_one]), rtol=1e-4, atol=1e-5)
    assert result.pred_boxes.tensor.tolist() == [[0, 0, 2, 2], [3, 0, 4, 1]]
    assert result.pred_masks[1].tolist() == [[bool(x) for x in row] for row in CORNER]


def test_instance_with_fewer_pairs_than_asked_and_without_things():
    result = instance_inference(torch.rand(2, 4), torch.randn(2, 3, 3), is_thing=torch.zeros(3).bool(), top_k=100)
    assert len(result) == 0


def test_empty_masks_have_zero_boxes_and_scores():
    assert bounding_boxes(torch.zeros(2, 3, 4, dtype=torch.bool)).tolist() == [[0, 0, 0, 0]] * 2
    result = instance_inference(
        class_probs_of([0], 3), torch.full((1, 3, 3), -5.0), is_thing=torch.ones(3).bool(), top_k=1
    )
    assert result.scores.tolist() == [0]


@pytest.mark.parametrize("tasks", [[], ["semantic", "depth"]])
def test_unknown_tasks(tasks):
    with pytest.raises(ValueError, match="MODEL.OVSEG.TEST.TASKS.*allowed"):
        MaskInference(
            tasks=tasks,
            object_mask_threshold=0.8,
            overlap_threshold=0.8,
            postprocess_before_inference=False,
            top_k=10,
            boxes_from_masks=True,
        )


def test_mask_accuracy_is_no_result_of_masks():
    inference = MaskInference(
        tasks=["mask_accuracy"],
        object_mask_threshold=0.8,
        overlap_threshold=0.8,
        postprocess_before_inference=False,
        top_k=10,
        boxes_from_masks=True,
    )
    sizes = {"padded_size": (4, 4), "image_size": (4, 4), "output_size": (4, 4)}
    assert inference(torch.zeros(2, 3), torch.zeros(2, 4, 4), is_thing=torch.ones(2).bool(), **sizes) == {}
