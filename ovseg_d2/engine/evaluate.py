"""Evaluation of a model on all of ``DATASETS.TEST``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from torch import nn

from ovseg_d2.data import build_test_loader
from ovseg_d2.evaluation import build_evaluator, scored_tasks
from ovseg_d2.evaluation.results import results_table, write_results
from ovseg_d2.modeling.inference.test_time_augmentation import MultiScaleFlip

logger = logging.getLogger(__name__)
Results = dict[str, dict[str, dict[str, float]]]


def evaluate(
    cfg: CfgNode, model: nn.Module, *, extra: dict[str, Any] | None = None, augmented: bool = False
) -> Results:
    """Metrics of every dataset in ``DATASETS.TEST``, in percent.

    The model makes the results that a dataset can score, and no others: semantic ones alone where there are label
    images, as in the public configurations of such datasets. With ``augmented`` each dataset is evaluated a second
    time, at the sizes of ``TEST.AUG``: the task ``sem_seg_TTA``.

    The main process logs them as a table and writes them, with ``extra``, to ``OUTPUT_DIR/results.json``; predictions
    go to ``OUTPUT_DIR/inference/<dataset>``.

    Returns:
        {dataset: {task: {metric: value}}} in the main process, {} in the others.
    """
    models = {"": model}
    if augmented:
        models["_TTA"] = MultiScaleFlip.from_config(cfg, model).train(model.training)
    results: Results = {}
    for name in cfg.DATASETS.TEST:
        folder = Path(cfg.OUTPUT_DIR, "inference", name) if cfg.OUTPUT_DIR else None
        if folder and comm.is_main_process():
            folder.mkdir(parents=True, exist_ok=True)
        loader = build_test_loader(cfg, name)
        for suffix, tested in models.items():
            with _results_of(model, scored_tasks(cfg, name)):
                scores = inference_on_dataset(tested, loader, build_evaluator(cfg, name, folder))
            skipped = sum(comm.all_gather(loader.num_skipped))
            if skipped:
                logger.warning(f"{name}: {skipped} images could not be decoded and are missing from the evaluation")
            if comm.is_main_process():
                results.setdefault(name, {}).update({f"{task}{suffix}": values for task, values in scores.items()})
    if comm.is_main_process():
        logger.info(f"Results (percent):\n{results_table(results)}")
        if cfg.OUTPUT_DIR:
            path = Path(cfg.OUTPUT_DIR, "results.json")
            write_results(path, results, {"model": cfg.MODEL.META_ARCHITECTURE, **(extra or {})})
            logger.info(f"All metrics: {path}")
    return results


@contextmanager
def _results_of(model: nn.Module, tasks: Sequence[str]) -> Iterator[None]:
    """The model forms the results of these tasks alone."""
    whole = model.inference
    model.inference = whole.restricted(tasks)
    try:
        yield
    finally:
        model.inference = whole
