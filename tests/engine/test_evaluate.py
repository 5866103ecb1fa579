"""Evaluation with and without test-time augmentation, around stand-ins for data, model and evaluator."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from ovseg_d2.engine.evaluate import evaluate
from ovseg_d2.modeling.inference.mask_inference import MaskInference
from tests.helpers import random_input, tiny_cfg


class Loader(list):
    num_skipped = 0


class Sizes(DatasetEvaluator):
    """Scores: the mean of all class scores, and how many images there were."""

    def reset(self) -> None:
        self.values: list[float] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        self.values += [float(output["sem_seg"].mean()) for output in outputs]

    def evaluate(self) -> dict[str, dict[str, float]]:
        return {"sem_seg": {"mean": sum(self.values) / len(self.values), "images": len(self.values)}}


class Width(nn.Module):
    """Each score is the width of the image that the model gets."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.inference = MaskInference.from_config(cfg)

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        return [{"sem_seg": torch.full((2, 4, 4), float(x["image"].shape[-1]))} for x in batched_inputs]


@pytest.fixture
def cfg(tmp_path, monkeypatch) -> CfgNode:
    batches = [[random_input((40, 40), num_classes=2, num_masks=1, seed=i)] for i in range(3)]
    # By its full name: the package has a function of the module's name.
    module = importlib.import_module("ovseg_d2.engine.evaluate")
    monkeypatch.setattr(module, "build_test_loader", lambda cfg, name: Loader(batches))
    monkeypatch.setattr(module, "build_evaluator", lambda cfg, name, folder: Sizes())
    monkeypatch.setitem(MetadataCatalog.get("some_val").__dict__, "evaluator_type", "sem_seg")
    cfg = tiny_cfg(num_classes=2, tasks=["semantic"])
    cfg.DATASETS.TEST = ("some_val",)
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = (32, 64), 64
    return cfg


def test_augmented_results_stand_beside_the_others(cfg):
    model = Width(cfg).eval()
    assert evaluate(cfg, model) == {"some_val": {"sem_seg": {"mean": 40, "images": 3}}}
    results = evaluate(cfg, model, augmented=True)
    assert results == {"some_val": {"sem_seg": {"mean": 40, "images": 3}, "sem_seg_TTA": {"mean": 48, "images": 3}}}
    assert json.loads(Path(cfg.OUTPUT_DIR, "results.json").read_text())["results"] == results
    assert not model.training


def test_tasks_that_are_not_averaged_are_refused_before_the_evaluation(cfg):
    cfg.MODEL.OVSEG.TEST.TASKS = ["semantic", "instance"]
    with pytest.raises(ValueError, match="TEST.AUG.ENABLED is True"):
        evaluate(cfg, Width(cfg).eval(), augmented=True)


@pytest.mark.parametrize(
    ("kind", "tasks", "resize_first"),
    [("sem_seg", {"semantic"}, False), ("coco", {"instance"}, True), ("coco_panoptic_seg", None, True)],
)
def test_only_results_that_the_dataset_can_score_are_made(cfg, kind, tasks, resize_first, monkeypatch):
    cfg.MODEL.OVSEG.TEST.TASKS = ["semantic", "panoptic", "instance"]
    monkeypatch.setitem(MetadataCatalog.get("some_val").__dict__, "evaluator_type", kind)
    model, seen = Width(cfg).eval(), []
    model.register_forward_pre_hook(lambda model, _: seen.append(model.inference))
    whole = model.inference
    evaluate(cfg, model)
    assert [inference.tasks for inference in seen] == [tasks or whole.tasks] * 3
    assert all(inference.resize_first is resize_first for inference in seen)
    assert model.inference is whole
