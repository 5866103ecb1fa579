"""Evaluators, on files in the formats of the public tools."""

from __future__ import annotations

from typing import Any

from ovseg_d2.evaluation.panoptic_quality import panoptic_quality_from_files
from tests.parity import Case, flatten


def panoptic_quality(case: Case) -> dict[str, Any]:
    return flatten(
        panoptic_quality_from_files(
            case.folder / "gt.json", case.folder / "gt", case.folder / "pred.json", case.folder / "pred"
        )
    )


TOPICS = {"evaluation/panoptic_quality": panoptic_quality}
