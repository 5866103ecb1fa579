"""build_evaluator chooses by evaluator type and tasks; results become strict JSON."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ovseg_d2.evaluation import build_evaluator, results_table, write_results
from tests.evaluation.panoptic_files import CAT, GRASS, make_dataset, painted


def config(
    *tasks: str, oracle: str = "", generator: str = "Mask2FormerProposals", train: Sequence[str] = ()
) -> CfgNode:
    return CfgNode(
        {
            "MODEL": {
                "OVSEG": {"TEST": {"TASKS": list(tasks), "ORACLE": oracle}, "PROPOSALS": {"NAME": generator}},
                "SEM_SEG_HEAD": {"IGNORE_VALUE": 255},
            },
            "DATASETS": {"TRAIN": tuple(train)},
            "TEST": {"ON_CORRUPT_IMAGE": "raise"},
        }
    )


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path, [(painted("1122"), {1: CAT, 2: GRASS})])


def retype(dataset, evaluator_type):
    MetadataCatalog.get(dataset.name).__dict__["evaluator_type"] = evaluator_type


@pytest.mark.parametrize(
    ("evaluator_type", "tasks", "expected"),
    [
        ("sem_seg", ("semantic", "panoptic"), ["SemSegEvaluator"]),
        ("coco", ("semantic", "instance"), ["InstanceEvaluator"]),
        ("coco_panoptic_seg", ("panoptic",), ["PanopticEvaluator"]),
        (
            "ade20k_panoptic_seg",
            ("semantic", "panoptic", "instance"),
            ["SemSegEvaluator", "PanopticEvaluator", "InstanceEvaluator"],
        ),
    ],
)
def test_choice(dataset, evaluator_type, tasks, expected):
    retype(dataset, evaluator_type)
    evaluators = build_evaluator(config(*tasks), dataset.name)._evaluators
    assert [type(e).__name__ for e in evaluators] == expected


def test_unknown_type_and_useless_tasks(dataset):
    with pytest.raises(ValueError, match=r"\['panoptic'\], dataset .* can score \['mask_accuracy', 'semantic'\]"):
        retype(dataset, "sem_seg")
        build_evaluator(config("panoptic"), dataset.name)
    with pytest.raises(ValueError, match="evaluator_type 'lvis', known are .*'coco'"):
        retype(dataset, "lvis")
        build_evaluator(config("instance"), dataset.name)


def test_cityscapes_needs_the_extra(dataset, monkeypatch):
    retype(dataset, "cityscapes_sem_seg")
    monkeypatch.setattr("ovseg_d2.evaluation.cityscapes.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"ovseg_d2\[cityscapes\]"):
        build_evaluator(config("semantic"), dataset.name)


RESULTS = {"val": {"sem_seg": {"mIoU": np.float64(12.345), "hIoU": float("nan"), "IoU-cat": 3.0}, "segm": {"AP": 1}}}


def test_results_file(tmp_path):
    path = tmp_path / "run" / "results.json"
    write_results(path, RESULTS, {"steps": np.int64(3), "note": [float("inf")]})
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content["results"]["val"]["sem_seg"] == {"mIoU": 12.345, "hIoU": None, "IoU-cat": 3.0}
    assert content["steps"] == 3 and content["note"] == [None]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_results_table():
    table = results_table(RESULTS)
    assert "12.35" in table and "IoU-cat" not in table and "segm" in table
    assert "nan" not in table and table.splitlines()[2].split() == ["val", "12.35", "-"]
