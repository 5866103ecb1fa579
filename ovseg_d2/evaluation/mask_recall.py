"""How well masks cover what there is, whatever their classes: the best IoU that each ground-truth segment finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovseg_d2.structures import Vocabulary


def mask_ious(masks: Tensor, segments: Tensor) -> Tensor:
    """Intersection over union (Q, M) of masks (Q, L) and segments (M, L), both bool; 0 where both are empty."""
    a, b = masks.float(), segments.float()
    intersection = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1)[None] - intersection
    return intersection / union.clamp(min=1)


class MaskRecall:
    """Collects, image by image, the best IoU of every ground-truth segment.

    Pixels without a label and crowds count for nothing, neither in masks nor in segments (as in panoptic quality).
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        """
        Args:
            vocabulary: of the ground truth; it says which classes are things, and which are unseen.
        """
        self.vocabulary = vocabulary
        self._best: list[np.ndarray] = []
        self._class_ids: list[np.ndarray] = []

    def update(self, masks: Tensor, ids: np.ndarray, segments_info: Sequence[dict[str, Any]]) -> None:
        """Add an image.

        Args:
            masks: (Q, H, W) bool; Q may be 0.
            ids: (H, W) segment ids.
            segments_info: ``id`` and contiguous ``category_id`` of each segment, ``iscrowd`` where it is one.
        """
        targets = [segment for segment in segments_info if not segment.get("iscrowd", 0)]
        wanted = torch.tensor([segment["id"] for segment in targets], dtype=torch.int64)
        labels = torch.from_numpy(np.ascontiguousarray(ids)).long().flatten()
        labelled = torch.isin(labels, wanted)
        segments = labels[labelled] == wanted[:, None]
        best = torch.zeros(len(targets))
        if len(masks) and len(targets):
            best = mask_ious(masks.cpu().flatten(1)[:, labelled], segments).amax(dim=0)
        self._best.append(best.numpy())
        self._class_ids.append(np.array([segment["category_id"] for segment in targets], np.int64))

    def result(self) -> dict[str, float]:
        """Percent: ``mean_best_iou`` of all segments, and of those of things, stuffs, seen and unseen classes (the
        latter two for vocabularies that tell); NaN where there are none. ``recall_50`` is the share above 0.5."""
        best = np.concatenate([np.zeros(0), *self._best])
        class_ids = np.concatenate([np.zeros(0, np.int64), *self._class_ids])
        things = np.array(self.vocabulary.is_thing, bool)[class_ids]
        groups = {"": np.ones(len(best), bool), "_things": things, "_stuff": ~things}
        if self.vocabulary.is_seen:
            seen = np.array(self.vocabulary.is_seen, bool)[class_ids]
            groups |= {"_seen": seen, "_unseen": ~seen}
        scores = {f"mean_best_iou{name}": _percent(best[group]) for name, group in groups.items()}
        return {**scores, "recall_50": _percent(best > 0.5), "segments": len(best)}


def _percent(values: np.ndarray) -> float:
    return 100 * float(values.mean()) if len(values) else float("nan")
