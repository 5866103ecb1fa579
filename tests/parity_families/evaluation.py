"""Evaluators, on files in the formats of the public tools."""

from __future__ import annotations

from typing import Any

import torch

from ovseg_d2.evaluation import sem_seg_scores
from ovseg_d2.evaluation.panoptic_quality import panoptic_quality_from_files
from tests.parity import Case, flatten


def panoptic_quality(case: Case) -> dict[str, Any]:
    return flatten(
        panoptic_quality_from_files(
            case.folder / "gt.json", case.folder / "gt", case.folder / "pred.json", case.folder / "pred"
        )
    )


def hiou_eval(case: Case) -> dict[str, Any]:
    """ZSSeg's counts: rows are predictions, columns the ground truth, the last of both what is ignored."""
    confusion = case.inputs["conf_matrix"][:-1, :-1].T.numpy()
    names = [f"c{i}" for i in range(case.meta["num_classes"])]
    scores = sem_seg_scores(confusion, class_names=names, evaluation_set=case.meta["evaluation_set"])
    return {name: torch.tensor([value]) for name, value in scores.items()}


TOPICS = {"evaluation/panoptic_quality": panoptic_quality, "maft/hiou_eval": hiou_eval}
