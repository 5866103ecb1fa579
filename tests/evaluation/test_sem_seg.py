"""SemSegEvaluator: ground truth scores 100, imperfect predictions score what a hand says."""

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from PIL import Image

import ovseg_d2.data  # noqa: F401  (registers the datasets)
from ovseg_d2.evaluation import SemSegEvaluator, sem_seg_scores
from tests.evaluation.panoptic_files import CAT, DOG, GRASS, make_dataset, painted, sem_seg_output

PANOPTIC = painted("1112 1133")  # id 2 is in no segment: ignored
LABELS = np.array([[CAT, CAT, CAT, 255], [CAT, CAT, GRASS, GRASS]])


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path, [(PANOPTIC, {1: CAT, 3: GRASS})])


def evaluate(dataset, labels, **changes):
    evaluator = SemSegEvaluator(dataset_name=dataset.name)
    evaluator.process([dataset.inputs[0] | changes], [sem_seg_output(labels)])
    return evaluator.evaluate()["sem_seg"]


@pytest.mark.parametrize("source", ["panoptic", "png", "tif"])
def test_ground_truth_scores_100(dataset, tmp_path, source):
    changes = {}
    if source != "panoptic":
        ignore = 255 if source == "png" else 65535
        MetadataCatalog.get(dataset.name).__dict__["ignore_label"] = ignore
        labels = np.where(LABELS == 255, ignore, LABELS).astype(np.uint8 if source == "png" else np.uint16)
        changes["sem_seg_file_name"] = str(tmp_path / f"labels.{source}")
        Image.fromarray(labels).save(changes["sem_seg_file_name"])
    scores = evaluate(dataset, np.where(LABELS == 255, DOG, LABELS), **changes)
    assert {k: scores[k] for k in ("mIoU", "fwIoU", "mACC", "pACC")} == dict.fromkeys(
        ("mIoU", "fwIoU", "mACC", "pACC"), 100
    )
    # A dog predicted on an ignored pixel alone does not bring the class into the mean.
    assert np.isnan(scores["IoU-dog"]) and np.isnan(scores["ACC-dog"])
    assert "mIoU_seen" not in scores and "hIoU" not in scores


def test_a_prepared_file_that_is_absent_is_derived(dataset, tmp_path):
    scores = evaluate(dataset, np.where(LABELS == 255, 0, LABELS), sem_seg_file_name=str(tmp_path / "absent.png"))
    assert scores["mIoU"] == 100


def test_imperfect_by_hand(dataset):
    # Of 5 cat pixels 3 are right, 1 is taken for a dog, 1 for grass; of 2 grass pixels 1 is taken for a cat.
    pred = np.array([[CAT, CAT, DOG, CAT], [CAT, GRASS, GRASS, CAT]])
    MetadataCatalog.get(dataset.name).set(class_is_seen=[True, True, False])
    scores = evaluate(dataset, pred)
    cat, grass, dog = 3 / (5 + 4 - 3), 1 / (2 + 2 - 1), 0 / (0 + 1)
    assert scores["IoU-cat"] == pytest.approx(100 * cat)
    assert scores["IoU-grass"] == pytest.approx(100 * grass)
    assert scores["IoU-dog"] == dog == 0
    assert scores["mIoU"] == pytest.approx(100 * (cat + grass + dog) / 3)
    assert scores["fwIoU"] == pytest.approx(100 * (5 / 7 * cat + 2 / 7 * grass))
    assert scores["mACC"] == pytest.approx(100 * (3 / 5 + 1 / 2) / 2)
    assert scores["pACC"] == pytest.approx(100 * 4 / 7)
    assert scores["mIoU_seen"] == pytest.approx(100 * (cat + grass) / 2)
    assert scores["mIoU_unseen"] == 0 and scores["hIoU"] == 0


def test_swapped_classes_score_nothing(dataset):
    scores = evaluate(dataset, np.where(LABELS == CAT, GRASS, CAT))
    assert scores["mIoU"] == scores["pACC"] == scores["fwIoU"] == 0


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([True, False], (50, 60, 2 * 50 * 60 / 110)),
        ([False, True], (60, 50, 2 * 50 * 60 / 110)),
        ([True, True], (55, None, None)),
    ],
)
def test_harmonic_mean(seen, expected):
    # IoU of a: 2 / (2 + 4 - 2) = 0.5; of b: 3 / (5 + 3 - 3) = 0.6.
    confusion = np.array([[2, 0], [2, 3]])
    scores = sem_seg_scores(confusion, class_names=["a", "b"], class_is_seen=seen)
    for key, value in zip(("mIoU_seen", "mIoU_unseen", "hIoU"), expected, strict=True):
        assert np.isnan(scores[key]) if value is None else scores[key] == pytest.approx(value)


def test_an_image_seen_twice_counts_once(tmp_path):
    wrong = np.full((2, 4), GRASS)
    dataset = make_dataset(tmp_path, [(PANOPTIC, {1: CAT, 3: GRASS}), (PANOPTIC, {1: CAT, 3: GRASS})])
    evaluator = SemSegEvaluator(dataset_name=dataset.name)
    right = np.where(LABELS == 255, 0, LABELS)
    evaluator.process([*dataset.inputs, dataset.inputs[1]], [sem_seg_output(x) for x in (right, wrong, wrong)])
    assert evaluator.evaluate()["sem_seg"]["pACC"] == pytest.approx(100 * (7 + 2) / 14)


def test_bad_input(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"0.png: ground truth is \(2, 4\), the prediction \(1, 4\)"):
        evaluate(dataset, LABELS[1:])
    Image.fromarray(np.array([[3, 3, 3, 0], [200, 255, 1, 2]], dtype=np.uint8)).save(tmp_path / "labels.png")
    with pytest.raises(
        ValueError, match=r"labels.png has labels 3, 200 \(4 pixels\), expected 0..2 or the ignore label 255"
    ):
        evaluate(dataset, np.zeros_like(LABELS), sem_seg_file_name=str(tmp_path / "labels.png"))
    Image.fromarray(np.zeros((2, 4, 3), dtype=np.uint8)).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match=r"rgb.png: semantic ground truth has one channel"):
        evaluate(dataset, np.zeros_like(LABELS), sem_seg_file_name=str(tmp_path / "rgb.png"))
    evaluator = SemSegEvaluator(dataset_name=dataset.name)
    with pytest.raises(ValueError, match="sem_seg has 5 classes, the dataset 3"):
        evaluator.process(dataset.inputs, [sem_seg_output(np.zeros_like(LABELS), num_classes=5)])
    with pytest.raises(FileNotFoundError, match="semantic ground truth of a.jpg not found: none registered"):
        evaluator.process([{"file_name": "a.jpg"}], [sem_seg_output(np.zeros_like(LABELS))])


def test_sets_of_classes(dataset):
    """ZSSeg's scores of a set of classes and of all the others, from the counts of the test by hand above."""
    pred = np.array([[CAT, CAT, DOG, CAT], [CAT, GRASS, GRASS, CAT]])
    metadata = MetadataCatalog.get(dataset.name)
    metadata.set(class_is_seen=[True, True, False], evaluation_set={"base": [CAT, GRASS], "novel_thing": [DOG]})
    scores = evaluate(dataset, pred)
    for ours, theirs in (("mIoU_seen", "mIoU-base"), ("mIoU_unseen", "mIoU-unbase"), ("hIoU", "hIoU-base")):
        assert scores[ours] == scores[theirs]
    assert scores["mIoU-novel_thing"] == 0 and scores["mIoU-unnovel_thing"] == scores["mIoU_seen"]
    assert scores["pAcc-base"] == pytest.approx(100 * 4 / 7) and np.isnan(scores["pAcc-unbase"])


def test_evaluation_set_of_another_table():
    with pytest.raises(ValueError, match=r"evaluation_set 'base' has class 2; expected 0..1"):
        sem_seg_scores(np.eye(2), class_names=["a", "b"], evaluation_set={"base": [0, 2]})


def test_names_that_count_as_background(tmp_path):
    """PAS-20b: 20 classes, 39 more names, and the label 20 for all that is none of the 20."""
    name = "voc_background_sem_seg_val"
    Image.fromarray(np.array([[0, 0, 19, 20, 20, 255]], np.uint8)).save(tmp_path / "labels.png")
    image = {"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "labels.png")}
    evaluator = SemSegEvaluator(dataset_name=name)
    evaluator.process([image], [sem_seg_output(np.array([[0, 30, 19, 20, 58, 0]]), num_classes=59)])
    scores = evaluator.evaluate()["sem_seg"]
    # Of 2 pixels of an aeroplane 1 is right; 2 of background are right, whatever their names, and 1 is wrong.
    assert scores["IoU-aeroplane"] == pytest.approx(50) and scores["IoU-tv"] == 100
    assert scores["IoU-background"] == pytest.approx(100 * 2 / 3) and np.isnan(scores["IoU-person"])
    assert scores["mIoU"] == pytest.approx((50 + 100 + 200 / 3) / 3)
    assert sum(key.startswith("IoU-") for key in scores) == 21 and "mIoU_seen" not in scores
    with pytest.raises(ValueError, match="sem_seg has 21 classes, the dataset 59"):
        evaluator.process([image], [sem_seg_output(np.zeros((1, 6), int), num_classes=21)])
