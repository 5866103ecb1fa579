"""What the ways to form panoptic and instance results share: segments with their ids, and scored instances."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ovseg_d2.modeling.layers.boxes import bounding_boxes


def numbered_segments(labels: Tensor, accepted: Tensor, is_thing: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """Ids of accepted masks, from 1 in their order; masks of one stuff class share an id.

    Args:
        labels: (Q,) int64 in [0, K).
        accepted: (Q,) bool.
        is_thing: (K,) bool.

    Returns:
        (Q,) int32, 0 for what is not accepted, and for each segment a dict of ``id``, ``isthing``, ``category_id``.
    """
    ids = [0] * len(labels)
    segments: list[dict[str, Any]] = []
    stuff_ids: dict[int, int] = {}
    things = is_thing.to(labels.device)[labels].tolist()
    for i, (ok, label, thing) in enumerate(zip(accepted.tolist(), labels.tolist(), things, strict=True)):
        if not ok:
            continue
        if not thing and label in stuff_ids:
            ids[i] = stuff_ids[label]
            continue
        ids[i] = len(segments) + 1
        if not thing:
            stuff_ids[label] = ids[i]
        segments.append({"id": ids[i], "isthing": thing, "category_id": label})
    return torch.tensor(ids, device=labels.device, dtype=torch.int32), segments


def scored_instances(
    mask_logits: Tensor, rows: Tensor, class_scores: Tensor, labels: Tensor, *, boxes_from_masks: bool
) -> Instances:
    """n instances, best first: masks where the logit is above 0, scored by class and mean mask probability inside.

    Args:
        mask_logits: (Q, H, W).
        rows: (n,) int64 in [0, Q), the instances' masks; a mask can serve several.
        class_scores: (n,).
        labels: (n,) int64.
        boxes_from_masks: tight boxes; otherwise zeros.
    """
    masks = mask_logits > 0
    mask_scores = (mask_logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
    scores, order = (class_scores * mask_scores[rows]).sort(descending=True, stable=True)
    rows = rows[order]
    boxes = bounding_boxes(masks) if boxes_from_masks else mask_scores.new_zeros(len(masks), 4)
    result = Instances(tuple(mask_logits.shape[-2:]))
    result.pred_masks = masks[rows]
    result.pred_boxes = Boxes(boxes[rows])
    result.scores = scores
    result.pred_classes = labels[order]
    return result
