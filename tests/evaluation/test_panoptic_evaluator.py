"""PanopticEvaluator: ground truth scores 100, imperfect predictions score what a hand says."""

import json
import logging

import numpy as np
import pytest
from detectron2.utils import comm

from ovseg_d2.evaluation import PanopticEvaluator, panoptic_quality_from_files
from tests.evaluation.panoptic_files import CAT, DOG, GRASS, make_dataset, painted, panoptic_output

# Cat 16 pixels, dog 8, grass 16.
GT = painted("1111223333 1111223333 1111223333 1111223333")
CLASSES = {1: CAT, 2: DOG, 3: GRASS}


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path, [(GT, CLASSES), (GT[::-1, ::-1].copy(), CLASSES)])


def evaluate(evaluator, dataset, outputs):
    evaluator.process(dataset.inputs, outputs)
    return evaluator.evaluate()["panoptic_seg"]


def test_ground_truth_scores_100(dataset):
    outputs = [panoptic_output(GT, CLASSES), panoptic_output(GT[::-1, ::-1].copy(), CLASSES)]
    scores = evaluate(PanopticEvaluator(dataset_name=dataset.name), dataset, outputs)
    assert set(scores) == {
        *("PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st"),
        *("PQ-grass", "PQ-cat", "PQ-dog"),
    }
    assert all(value == 100 for value in scores.values())


def test_imperfect_by_hand(tmp_path):
    dataset = make_dataset(tmp_path, [(GT, CLASSES)])
    # Cat shifted by one: overlap 12 of 16 + 16 - 12 = 20, IoU 0.6. Dog missing. Grass short of a row: 12 / 16 = 0.75.
    # A second cat on the grass that does not exist.
    pred = painted("0777708888 0777708888 0777708888 0777709999")
    pred[:, 4] = 7
    pred[:, 0] = 0
    classes = {7: CAT, 8: GRASS, 9: CAT}
    scores = evaluate(PanopticEvaluator(dataset_name=dataset.name), dataset, [panoptic_output(pred, classes)])
    # Cat: TP 1 (0.6), FP 1 -> RQ = 1 / 1.5, PQ = 0.4. Dog: FN 1 -> 0. Grass: TP 1 (0.75).
    assert scores["PQ-cat"] == pytest.approx(40) and scores["PQ-dog"] == 0 and scores["PQ-grass"] == pytest.approx(75)
    assert scores["PQ"] == pytest.approx((40 + 0 + 75) / 3)
    assert scores["SQ"] == pytest.approx((60 + 0 + 75) / 3)
    assert scores["RQ"] == pytest.approx((200 / 3 + 0 + 100) / 3)
    assert scores["PQ_th"] == pytest.approx(20) and scores["PQ_st"] == pytest.approx(75)


def test_swapped_classes(dataset):
    swapped = {1: DOG, 2: CAT, 3: GRASS}
    outputs = [panoptic_output(GT, swapped), panoptic_output(GT[::-1, ::-1].copy(), swapped)]
    scores = evaluate(PanopticEvaluator(dataset_name=dataset.name), dataset, outputs)
    assert (scores["PQ_th"], scores["PQ_st"], scores["PQ"]) == (0, 100, pytest.approx(100 / 3))


def test_written_predictions_are_official_files(dataset, tmp_path):
    pred = np.roll(GT, 1, axis=1)
    evaluator = PanopticEvaluator(dataset_name=dataset.name, output_folder=tmp_path / "out")
    scores = evaluate(evaluator, dataset, [panoptic_output(pred, CLASSES), panoptic_output(GT, CLASSES)])
    written = tmp_path / "out" / "panoptic_predictions.json"
    tables = json.loads(written.read_text())
    assert set(tables) == {"images", "annotations", "categories"}
    assert {s["category_id"] for a in tables["annotations"] for s in a["segments_info"]} == {7, 9, 30}
    from_files = panoptic_quality_from_files(
        tmp_path / "panoptic.json", tmp_path / "png", written, written.with_suffix("")
    )
    assert 0 < scores["PQ"] < 100
    assert 100 * from_files["All"]["pq"] == pytest.approx(scores["PQ"])


def test_processes_are_merged_and_duplicates_count_once(dataset, monkeypatch):
    perfect, empty = panoptic_output(GT, CLASSES), panoptic_output(np.zeros_like(GT), {})
    first, second = (PanopticEvaluator(dataset_name=dataset.name) for _ in range(2))
    first.process(dataset.inputs, [perfect, empty])
    second.process(dataset.inputs[1:], [empty])
    shares = {id(first._quality.images): second._quality.images, id(first._predictions): second._predictions}
    monkeypatch.setattr(comm, "gather", lambda data, dst: [data, shares[id(data)]])
    assert first.evaluate()["panoptic_seg"]["PQ"] == pytest.approx(100 * 1 / 1.5)  # 1 TP and 1 FN a class


def test_missing_predictions(dataset, caplog):
    evaluator = PanopticEvaluator(dataset_name=dataset.name)
    evaluator.process(dataset.inputs[:1], [panoptic_output(GT, CLASSES)])
    with pytest.raises(ValueError, match="1 of 2 images .*panoptic.json have no prediction, the first is 1"):
        evaluator.evaluate()
    lenient = PanopticEvaluator(dataset_name=dataset.name, allow_missing=True)
    lenient.process(dataset.inputs[:1], [panoptic_output(GT, CLASSES)])
    with caplog.at_level(logging.WARNING):
        assert lenient.evaluate()["panoptic_seg"]["PQ"] == 100
    assert "1 of 2 images" in caplog.text


def test_bad_input(dataset):
    evaluator = PanopticEvaluator(dataset_name=dataset.name)
    with pytest.raises(ValueError, match="predicted class 0 is not a thing class of .*panoptic.json"):
        evaluator.process(dataset.inputs[:1], [panoptic_output(GT, {1: GRASS, 2: DOG, 3: GRASS}, things={GRASS})])
    with pytest.raises(ValueError, match=r"0.jpg: the prediction is \(2, 10\), the ground truth \(4, 10\)"):
        evaluator.process(dataset.inputs[:1], [panoptic_output(GT[:2], CLASSES)])
    with pytest.raises(ValueError, match="no annotation for image 99"):
        evaluator.process([dataset.inputs[0] | {"image_id": 99}], [panoptic_output(GT, CLASSES)])
    with pytest.raises(ValueError, match=r"needs model output 'panoptic_seg', found \['sem_seg'\]"):
        evaluator.process(dataset.inputs[:1], [{"sem_seg": None}])
