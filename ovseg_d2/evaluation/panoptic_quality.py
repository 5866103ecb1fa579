"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 4) with void and crowd regions.

The numbers equal those of the official COCO tool, whose conventions the paper leaves open:

* A prediction matches a ground-truth segment of its category if IoU > 0.5, where the part of the prediction that lies
  on unlabelled ground truth (id 0) does not count towards the union. At most one partner can reach that.
* Crowd segments never match and never count as missed.
* An unmatched prediction is a false positive, unless more than half of it lies on unlabelled pixels and on the crowd
  segment of its own category.
"""

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ovseg_d2.evaluation.panoptic_png import read_panoptic_png

VOID_ID = 0
Segments = Sequence[Mapping[str, Any]]
# Columns of an image's statistics.
IOU, TRUE_POSITIVE, FALSE_POSITIVE, FALSE_NEGATIVE = range(4)


class PanopticQuality:
    """Accumulates matches per image and category and turns them into PQ = SQ * RQ.

    Statistics are kept per image, so that an image seen twice (padded samplers, several processes) counts once.

    Args:
        categories: one mapping a category with ``id`` and ``isthing``, as in a COCO-panoptic file.
    """

    def __init__(self, *, categories: Iterable[Mapping[str, Any]]) -> None:
        self.is_thing: dict[int, bool] = {c["id"]: bool(c["isthing"]) for c in categories}
        self._column = {category_id: k for k, category_id in enumerate(self.is_thing)}
        self.images: dict[Hashable, tuple[np.ndarray, np.ndarray]] = {}

    def update(
        self,
        image_id: Hashable,
        *,
        gt_ids: np.ndarray,
        gt_segments: Segments,
        pred_ids: np.ndarray,
        pred_segments: Segments,
        name: str | None = None,
    ) -> None:
        """Adds one image.

        Args:
            image_id: key of the image; adding the same image again replaces it.
            gt_ids: (H, W) integer segment ids, 0 is unlabelled.
            gt_segments: ``id``, ``category_id``, optionally ``iscrowd`` and ``area`` of every segment.
            pred_ids: (H, W) integer segment ids, 0 is void.
            pred_segments: ``id`` and ``category_id`` of every segment.
            name: what messages call the image, a file name for example.

        Raises:
            ValueError: sizes differ, a category is unknown, or ids of the prediction's map and list disagree.
        """
        name = name or f"image {image_id!r}"
        if gt_ids.shape != pred_ids.shape:
            raise ValueError(f"{name}: the prediction is {pred_ids.shape}, the ground truth {gt_ids.shape} (H, W)")
        gt_columns = self._columns(gt_segments, f"{name}: ground truth")
        pred_columns = self._columns(pred_segments, f"{name}: prediction")
        gt_list, pred_list = [s["id"] for s in gt_segments], [s["id"] for s in pred_segments]
        table, num_unlisted = _overlaps(gt_ids, gt_list, pred_ids, pred_list)
        if num_unlisted:
            raise ValueError(f"{name}: {num_unlisted} predicted pixels have an id that segments_info does not list")
        pred_area = table.sum(axis=0)[1:]  # (P,)
        if (pred_area == 0).any():
            empty = [pred_list[p] for p in np.flatnonzero(pred_area == 0)]
            raise ValueError(f"{name}: predicted segments {empty} are in segments_info and have no pixel")

        # The official tool takes the annotated area, which is the pixel count in every sound file.
        counted = table[1:-1].sum(axis=1)
        gt_area = np.array([s.get("area", a) for s, a in zip(gt_segments, counted, strict=True)], dtype=np.float64)
        is_crowd = np.array([bool(s.get("iscrowd", 0)) for s in gt_segments], dtype=bool)
        on_void = table[0, 1:]  # (P,) pixels of each prediction on unlabelled ground truth
        overlap = table[1:-1, 1:]  # (G, P)

        union = pred_area[None] + gt_area[:, None] - overlap - on_void[None]
        comparable = (gt_columns[:, None] == pred_columns[None]) & ~is_crowd[:, None]
        matched = comparable & (2 * overlap > union)  # (G, P), at most one True a row and a column

        # The format has one crowd segment a category and image; of several the official tool takes the last one.
        on_crowd = np.zeros_like(pred_area)
        for g in np.flatnonzero(is_crowd):
            on_crowd = np.where(pred_columns == gt_columns[g], overlap[g], on_crowd)
        excused = 2 * (on_void + on_crowd) > pred_area

        statistics = np.zeros((len(self.is_thing), 4))
        rows, columns = np.nonzero(matched)
        np.add.at(statistics, (gt_columns[rows], IOU), overlap[rows, columns] / union[rows, columns])
        np.add.at(statistics, (gt_columns[rows], TRUE_POSITIVE), 1)
        np.add.at(statistics, (pred_columns[~matched.any(axis=0) & ~excused], FALSE_POSITIVE), 1)
        np.add.at(statistics, (gt_columns[~matched.any(axis=1) & ~is_crowd], FALSE_NEGATIVE), 1)
        present = np.flatnonzero(statistics.any(axis=1))
        self.images[image_id] = (present, statistics[present])

    def result(self) -> dict[str, dict]:
        """PQ, SQ and RQ in 0..1, averaged over the categories that occur.

        Returns:
            ``All``, ``Things``, ``Stuff``: {``pq``, ``sq``, ``rq``, ``n``} with n the number of categories averaged
            (NaN if there are none), and ``per_class``: {category id: {``pq``, ``sq``, ``rq``}}, NaN for a category that
            occurs nowhere.
        """
        total = np.zeros((len(self.is_thing), 4))
        for present, statistics in self.images.values():
            total[present] += statistics
        iou, tp, fp, fn = total.T
        weight = tp + (fp + fn) / 2
        occurs = weight > 0
        scores = np.stack([_ratio(iou, weight), _ratio(iou, tp), _ratio(tp, weight)], axis=1)  # (K, 3)
        scores[~occurs] = np.nan

        things = np.array(list(self.is_thing.values()), dtype=bool)
        result: dict[str, dict] = {}
        for group, members in (("All", occurs), ("Things", occurs & things), ("Stuff", occurs & ~things)):
            mean = scores[members].mean(axis=0).tolist() if members.any() else [float("nan")] * 3
            result[group] = dict(zip(("pq", "sq", "rq"), mean, strict=True), n=int(members.sum()))
        per_class = (dict(zip(("pq", "sq", "rq"), row, strict=True)) for row in scores.tolist())
        result["per_class"] = dict(zip(self.is_thing, per_class, strict=True))
        return result

    def _columns(self, segments: Segments, name: str) -> np.ndarray:
        """Positions (S,) of the segments' categories; unknown ones are an error."""
        unknown = sorted({s["category_id"] for s in segments} - self._column.keys())
        if unknown:
            raise ValueError(
                f"{name}: category ids {unknown} are not among the dataset's {len(self._column)} categories"
            )
        return np.array([self._column[s["category_id"]] for s in segments], dtype=np.int64)


def panoptic_quality_from_files(
    gt_json: str | Path, gt_folder: str | Path, pred_json: str | Path, pred_folder: str | Path
) -> dict[str, dict]:
    """PQ of COCO-panoptic files (JSON and PNG), in fractions, laid out as ``PanopticQuality.result`` says.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an annotated image has no prediction, or ``PanopticQuality.update`` refuses it.
    """
    ground_truth = json.loads(Path(gt_json).read_text())
    predictions = {a["image_id"]: a for a in json.loads(Path(pred_json).read_text())["annotations"]}
    quality = PanopticQuality(categories=ground_truth["categories"])
    for annotation in ground_truth["annotations"]:
        image_id = annotation["image_id"]
        if image_id not in predictions:
            raise ValueError(f"{pred_json}: no prediction for image {image_id!r} of {gt_json}")
        prediction = predictions[image_id]
        quality.update(
            image_id,
            gt_ids=read_panoptic_png(Path(gt_folder) / annotation["file_name"]),
            gt_segments=annotation["segments_info"],
            pred_ids=read_panoptic_png(Path(pred_folder) / prediction["file_name"]),
            pred_segments=prediction["segments_info"],
            name=str(Path(pred_folder) / prediction["file_name"]),
        )
    result = quality.result()
    for scores in result["per_class"].values():
        for metric, value in scores.items():
            scores[metric] = float(np.nan_to_num(value))  # the official tool writes 0 for a category without segments
    return result


def _overlaps(
    gt_ids: np.ndarray, gt_list: Sequence[int], pred_ids: np.ndarray, pred_list: Sequence[int]
) -> tuple[np.ndarray, int]:
    """Pixels shared by every pair of segments.

    Returns:
        table (1 + G + 1, 1 + P) and the number of pixels with an unlisted predicted id. Row and column 0 are void; the
        last row holds pixels of unlisted ground-truth ids, which are not void but belong to no segment.
    """
    gt_index = _positions(gt_ids, gt_list)
    pred_index = _positions(pred_ids, pred_list)
    shape = (len(gt_list) + 2, len(pred_list) + 2)
    table = np.bincount(gt_index * shape[1] + pred_index, minlength=shape[0] * shape[1]).reshape(shape)
    return table[:, :-1], int(table[:, -1].sum())


def _positions(ids: np.ndarray, listed: Sequence[int]) -> np.ndarray:
    """Position (H * W,) of every pixel's id in [void, *listed, anything else]."""
    keys = np.array([VOID_ID, *listed], dtype=np.int64)
    order = np.argsort(keys, kind="stable")
    flat = ids.reshape(-1).astype(np.int64)
    found = order[np.searchsorted(keys, flat, sorter=order).clip(max=len(keys) - 1)]
    return np.where(keys[found] == flat, found, len(keys))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
