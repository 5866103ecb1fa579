"""InstanceEvaluator: ground truth scores 100, imperfect predictions score what a hand says."""

import json

import numpy as np
import pytest
from detectron2.data import MetadataCatalog

from ovseg_d2.evaluation import InstanceEvaluator
from ovseg_d2.evaluation.instance import encode_masks
from tests.evaluation.panoptic_files import CAT, CATEGORIES, DOG, GRASS, instances_output, make_dataset

SIZE = (8, 30)


def strip(start: int, stop: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[:, start:stop] = True
    return mask


def ids_of(**columns: tuple[int, int]) -> np.ndarray:
    ids = np.zeros(SIZE, dtype=np.int64)
    for name, (start, stop) in columns.items():
        ids[:, start:stop] = int(name[1:])
    return ids


# Two cats and grass between them.
IDS, CLASSES = ids_of(_1=(0, 9), _2=(9, 12), _3=(12, 20)), {1: CAT, 2: GRASS, 3: CAT}


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path, [(IDS, CLASSES)])


@pytest.fixture(params=["json_file", "panoptic"])
def both_sources(request, dataset, tmp_path):
    """The same dataset with an instance file and with panoptic files alone."""
    if request.param == "json_file":
        annotations = [
            {
                "id": i,
                "image_id": 0,
                "category_id": 7,
                "iscrowd": 0,
                "bbox": [start, 0, stop - start, SIZE[0]],
                "area": SIZE[0] * (stop - start),
                "segmentation": encode_masks(strip(start, stop)[None])[0],
            }
            for i, (start, stop) in enumerate([(0, 9), (12, 20)], 1)
        ]
        tables = {
            "images": [{"id": 0, "height": SIZE[0], "width": SIZE[1], "file_name": "0.jpg"}],
            "categories": [c for c in CATEGORIES if c["isthing"]],
            "annotations": annotations,
        }
        (tmp_path / "instances.json").write_text(json.dumps(tables))
        MetadataCatalog.get(dataset.name).set(json_file=str(tmp_path / "instances.json"))
    return dataset


def evaluate(dataset, masks, scores, classes):
    evaluator = InstanceEvaluator(dataset_name=dataset.name)
    evaluator.process(dataset.inputs, [instances_output(masks, scores, classes, SIZE)])
    return evaluator.evaluate()


def test_ground_truth_scores_100(both_sources):
    results = evaluate(both_sources, [strip(0, 9), strip(12, 20)], [0.9, 0.8], [CAT, CAT])
    for kind in ("segm", "bbox"):
        assert results[kind]["AP"] == results[kind]["AP50"] == results[kind]["AP-cat"] == pytest.approx(100)
        assert np.isnan(results[kind]["AP-dog"]) and np.isnan(results[kind]["APl"])


def test_imperfect_by_hand(both_sources):
    # By score: a right cat, a cat that does not exist, a cat with 7 of 9 columns (IoU 0.778).
    results = evaluate(both_sources, [strip(12, 20), strip(22, 28), strip(0, 7)], [0.9, 0.8, 0.7], [CAT, CAT, CAT])
    # Where the third counts (6 thresholds, 0.5..0.75): precision 1 up to recall 0.5 (51 of 101 points), 2/3 beyond.
    # At the other 4 thresholds only the first counts: precision 1 up to recall 0.5, 0 beyond.
    both, one = (51 + 50 * 2 / 3) / 101, 51 / 101
    for kind in ("segm", "bbox"):
        assert results[kind]["AP"] == pytest.approx(100 * (6 * both + 4 * one) / 10)
        assert results[kind]["AP50"] == results[kind]["AP75"] == pytest.approx(100 * both)


def test_swapped_class_scores_nothing(both_sources):
    assert evaluate(both_sources, [strip(0, 9), strip(12, 20)], [0.9, 0.8], [DOG, DOG])["segm"]["AP"] == 0


def test_no_prediction_scores_0(both_sources):
    results = evaluate(both_sources, [], [], [])
    assert results["segm"]["AP"] == 0 and "bbox" not in results


def test_more_than_255_predictions(both_sources):
    masks = [strip(0, 9), strip(12, 20)] + [strip(22, 28)] * 298
    results = evaluate(both_sources, masks, np.linspace(0.9, 0.1, 300).tolist(), [CAT] * 300)
    assert results["segm"]["AP"] == results["bbox"]["AP"] == pytest.approx(100)


def test_crowd_is_ignored(tmp_path):
    ids = ids_of(_1=(0, 9), _2=(12, 28))
    dataset = make_dataset(tmp_path, [(ids, {1: CAT, 2: CAT})], crowd={2})
    # The first detection lies in the crowd: neither right nor wrong.
    results = evaluate(dataset, [strip(14, 20), strip(0, 9)], [0.9, 0.8], [CAT, CAT])
    assert results["segm"]["AP"] == pytest.approx(100)


def test_results_file_is_coco(dataset, tmp_path):
    evaluator = InstanceEvaluator(dataset_name=dataset.name, output_folder=tmp_path / "out")
    evaluator.process(dataset.inputs, [instances_output([strip(0, 9)], [0.5], [CAT], SIZE)])
    evaluator.evaluate()
    (result,) = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert (result["image_id"], result["category_id"], result["score"]) == (0, 7, 0.5)
    assert result["bbox"] == [0, 0, 9, 8] and result["segmentation"]["size"] == list(SIZE)


def test_bad_input(both_sources):
    evaluator = InstanceEvaluator(dataset_name=both_sources.name)
    with pytest.raises(ValueError, match=r"predicted classes \[0\] are not thing classes"):
        evaluator.process(both_sources.inputs, [instances_output([strip(0, 9)], [0.5], [GRASS], SIZE)])
    small = strip(0, 9)[:4]
    with pytest.raises(ValueError, match=r"0.jpg: the prediction is \(4, 30\), .* says \(8, 30\)"):
        evaluator.process(both_sources.inputs, [instances_output([small], [0.5], [CAT], small.shape)])


def test_missing_images_and_files(both_sources, tmp_path):
    metadata = MetadataCatalog.get(both_sources.name)
    if metadata.get("json_file", None):
        evaluator = InstanceEvaluator(dataset_name=both_sources.name)
        with pytest.raises(ValueError, match="1 of 1 images of .*instances.json have no prediction"):
            evaluator.evaluate()
        with pytest.raises(ValueError, match="no image with id 5"):
            evaluator.process([both_sources.inputs[0] | {"image_id": 5}], [instances_output([], [], [], SIZE)])
        (tmp_path / "instances.json").unlink()
        with pytest.raises(FileNotFoundError, match="instances.json"):
            InstanceEvaluator(dataset_name=both_sources.name)
    else:
        with pytest.raises(ValueError, match="a.jpg: instance AP needs json_file"):
            InstanceEvaluator(dataset_name=both_sources.name).process(
                [{"file_name": "a.jpg", "image_id": 0}], [instances_output([], [], [], SIZE)]
            )
