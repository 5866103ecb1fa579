"""Evaluation results as strict JSON and as a table for the log."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from ovseg_d2.checkpoint.io import atomic_write

Results = Mapping[str, Mapping[str, Mapping[str, float]]]


def write_results(path: str | Path, results: Results, extra: Mapping[str, Any] | None = None) -> None:
    """Writes ``{**extra, "results": {dataset: {task: {metric: value}}}}``; a reader never sees half a file."""
    write_json(path, {**(extra or {}), "results": results})


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON that any parser takes: NaN and infinity become null, numpy numbers plain ones."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(f"{json.dumps(_plain(content), indent=1, allow_nan=False)}\n".encode())


def results_table(results: Results) -> str:
    """One table a task, a row a dataset, ``-`` for NaN; scores of single classes (``IoU-cat``) are left out."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for dataset, tasks in results.items():
        for task, scores in tasks.items():
            rows.setdefault(task, []).append(
                {task: dataset} | {k: _plain(v) for k, v in scores.items() if "-" not in k}
            )
    tables = (
        tabulate(part, headers="keys", floatfmt=".2f", tablefmt="simple", missingval="-") for part in rows.values()
    )
    return "\n\n".join(tables)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
