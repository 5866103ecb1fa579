"""Accuracy of the classes of perfect masks, by hand."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog

from ovseg_d2.evaluation import MaskAccuracyEvaluator, build_evaluator, results_table, write_results
from ovseg_d2.structures import Vocabulary
from tests.evaluation.panoptic_files import CAT, DOG, GRASS, make_dataset, painted
from tests.evaluation.test_build import config


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path, [(painted("1122"), {1: CAT, 2: GRASS})])


def image(name: str, class_ids: list[int], empty: tuple[int, ...] = ()) -> dict:
    masks = torch.ones(len(class_ids), 3, 5, dtype=torch.bool)
    masks[list(empty)] = False
    return {"file_name": name, "proposals": masks, "proposal_classes": torch.tensor(class_ids, dtype=torch.int64)}


def output(class_ids: list[int], num_classes: int = 3) -> dict:
    noise = torch.rand(len(class_ids), num_classes, generator=torch.Generator().manual_seed(0))
    one_hot = torch.nn.functional.one_hot(torch.tensor(class_ids, dtype=torch.int64), num_classes)
    return {"mask_class_probs": (one_hot + noise / 2).softmax(-1)}


# Cats: 2 of 4 right. Grass: 1 of 1. No dogs. In all 3 of 5.
INPUTS = [image("a", [CAT, CAT, GRASS], empty=(1,)), image("b", []), image("c", [CAT, CAT])]
OUTPUTS = [output([CAT, DOG, GRASS]), output([]), output([GRASS, CAT])]


def scores(name, inputs=INPUTS, outputs=OUTPUTS, **kwargs):
    evaluator = MaskAccuracyEvaluator(dataset_name=name, **kwargs)
    evaluator.process(inputs, outputs)
    return evaluator.evaluate()["mask_accuracy"]


def test_by_hand(dataset):
    found = scores(dataset.name)
    assert found["MaskAcc"] == pytest.approx(100 * (2 / 4 + 1) / 2)
    assert found["MaskAcc_overall"] == pytest.approx(100 * 3 / 5)
    assert (found["MaskAcc-cat"], found["MaskAcc-grass"]) == (50, 100) and np.isnan(found["MaskAcc-dog"])
    assert (found["masks"], found["empty_masks"]) == (5, 1)
    assert "hMaskAcc" not in found


@pytest.mark.parametrize("own_split", [True, False])
def test_seen_and_unseen(dataset, own_split):
    trained = Vocabulary(names=("kitty", "road"), is_thing=(True, False), synonyms=(("kitty", "cat"), ("road",)))
    if own_split:  # it comes first
        MetadataCatalog.get(dataset.name).set(class_is_seen=[True, False, True])
    found = scores(dataset.name, trained_vocabulary=trained)
    seen, unseen = (100, 50) if own_split else (50, 100)
    assert (found["MaskAcc_seen"], found["MaskAcc_unseen"]) == (seen, unseen)
    assert found["hMaskAcc"] == pytest.approx(2 * 50 * 100 / 150)


def test_no_masks_at_all(dataset, tmp_path):
    found = scores(dataset.name, [image("a", [])], [output([])])
    assert np.isnan(found["MaskAcc"]) and found["masks"] == found["empty_masks"] == 0
    assert "-" in results_table({"x": {"mask_accuracy": found}})
    write_results(tmp_path / "r.json", {"x": {"mask_accuracy": found}})
    assert json.loads((tmp_path / "r.json").read_text())["results"]["x"]["mask_accuracy"]["MaskAcc"] is None


def test_processes_share_their_images(dataset, monkeypatch):
    """An image that two processes saw counts once."""
    parts = []
    for rows in ((0, 1), (2, 0)):
        evaluator = MaskAccuracyEvaluator(dataset_name=dataset.name)
        evaluator.process([INPUTS[i] for i in rows], [OUTPUTS[i] for i in rows])
        parts.append(evaluator._images)
    monkeypatch.setattr("ovseg_d2.evaluation.gather.comm.gather", lambda records, dst: parts)
    merged = evaluator.evaluate()["mask_accuracy"]
    np.testing.assert_equal(merged, scores(dataset.name))
    monkeypatch.setattr("ovseg_d2.evaluation.gather.comm.is_main_process", lambda: False)
    assert evaluator.evaluate() is None
    evaluator.reset()
    assert not evaluator._images


def test_bad_input(dataset):
    with pytest.raises(ValueError, match=r"^a: mask_class_probs is \(3, 4\), expected \(3, 3\)"):
        scores(dataset.name, INPUTS[:1], [output([CAT, DOG, GRASS], num_classes=4)])
    with pytest.raises(ValueError, match=r"^c: mask_class_probs is \(3, 3\), expected \(2, 3\)"):
        scores(dataset.name, INPUTS[2:], OUTPUTS[:1])
    with pytest.raises(ValueError, match="^b: no masks of its annotation came with it; .* GroundTruthProposals"):
        scores(dataset.name, [{"file_name": "b"}], OUTPUTS[:1])
    with pytest.raises(ValueError, match="MaskAccuracyEvaluator needs model output 'mask_class_probs'"):
        scores(dataset.name, INPUTS[:1], [{"sem_seg": None}])


@pytest.mark.parametrize("evaluator_type", ["sem_seg", "coco", "ade20k_panoptic_seg", "cityscapes_panoptic_seg"])
def test_the_task(dataset, evaluator_type):
    MetadataCatalog.get(dataset.name).__dict__["evaluator_type"] = evaluator_type
    evaluators = build_evaluator(config("mask_accuracy", generator="GroundTruthProposals"), dataset.name)._evaluators
    assert [type(e).__name__ for e in evaluators] == ["MaskAccuracyEvaluator"]
    with pytest.raises(ValueError, match="has mask_accuracy, but MODEL.OVSEG.PROPOSALS.NAME is 'Mask2FormerProposals'"):
        build_evaluator(config("mask_accuracy"), dataset.name)
