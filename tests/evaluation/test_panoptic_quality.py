"""Panoptic quality against the official tool's numbers, hand-made cases of void and crowd, and torchmetrics."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovseg_d2.evaluation import PanopticQuality, panoptic_quality_from_files
from ovseg_d2.evaluation.panoptic_png import read_panoptic_png, write_panoptic_png

GOLDEN = Path(__file__).parents[1] / "goldens" / "evaluation" / "panoptic_quality" / "a"
THING, OTHER, STUFF = 1, 2, 3
CATEGORIES = [{"id": THING, "isthing": 1}, {"id": OTHER, "isthing": 1}, {"id": STUFF, "isthing": 0}]


def segment(id: int, category_id: int = THING, iscrowd: int = 0) -> dict:
    return {"id": id, "category_id": category_id, "iscrowd": iscrowd}


def row(*runs: tuple[int, int]) -> np.ndarray:
    """(1, W) ids from (id, length) runs."""
    return np.concatenate([np.full(length, id) for id, length in runs])[None]


def score(gt_ids, gt_segments, pred_ids, pred_segments) -> dict:
    quality = PanopticQuality(categories=CATEGORIES)
    quality.update(0, gt_ids=gt_ids, gt_segments=gt_segments, pred_ids=pred_ids, pred_segments=pred_segments)
    return quality.result()


def test_official_numbers_with_crowds():
    expected = json.loads((GOLDEN / "expected.json").read_text())
    result = panoptic_quality_from_files(GOLDEN / "gt.json", GOLDEN / "gt", GOLDEN / "pred.json", GOLDEN / "pred")
    for group in ("All", "Things", "Stuff"):
        assert result[group] == pytest.approx(expected[group], rel=1e-9)
    assert {str(k): v for k, v in result["per_class"].items()} == pytest.approx(
        {k: pytest.approx(v, rel=1e-9) for k, v in expected["per_class"].items()}
    )


A, B = segment(5), segment(6, STUFF)  # ground truth: the thing in question, and stuff beside it
P, Q = segment(8), segment(9)  # predictions of the thing's category


# Each case is one row of pixels; expected are (pq, sq, rq) of THING, None where it does not occur.
@pytest.mark.parametrize(
    ("gt", "gt_segments", "pred", "pred_segments", "expected"),
    [
        pytest.param(row((5, 10)), [A], row((8, 10)), [P], (1, 1, 1), id="same"),
        pytest.param(row((5, 10)), [A], row((0, 10)), [], (0, 0, 0), id="missing"),
        # Overlap 6 of union 10 + 10 - 6 = 14.
        pytest.param(row((5, 10), (6, 4)), [A, B], row((0, 4), (8, 10)), [P], (0, 0, 0), id="shifted too far"),
        # Overlap 8 of 10 + 10 - 8 = 12.
        pytest.param(row((5, 10), (6, 2)), [A, B], row((0, 2), (8, 10)), [P], (2 / 3, 2 / 3, 1), id="shifted"),
        # Overlap 5 of 10 + 5 - 5 = 10: exactly one half does not match, one FN and one FP.
        pytest.param(row((5, 10)), [A], row((8, 5), (0, 5)), [P], (0, 0, 0), id="one half"),
        # 9 of the prediction's 18 pixels lie on void and leave the union: 9 / (10 + 18 - 9 - 9).
        pytest.param(row((0, 9), (5, 10)), [A], row((8, 18), (0, 1)), [P], (0.9, 0.9, 1), id="void leaves the union"),
        # 6 of the second prediction's 10 pixels on void: no FP.
        pytest.param(row((5, 10), (6, 4), (0, 6)), [A, B], row((8, 10), (9, 10)), [P, Q], (1, 1, 1), id="void excuses"),
        # 5 of 10 on void is not more than half: 1 / (1 + 0.5).
        pytest.param(
            *(row((5, 10), (6, 5), (0, 5)), [A, B], row((8, 10), (9, 10)), [P, Q], (2 / 3, 1, 2 / 3)),
            id="half on void does not excuse",
        ),
        # 3 on void + 3 on the crowd of its category = 6 of 10; the crowd itself is never missed.
        pytest.param(
            *(row((5, 10), (6, 4), (0, 3), (7, 3)), [A, B, segment(7, THING, iscrowd=1)]),
            *(row((8, 10), (9, 10)), [P, Q], (1, 1, 1)),
            id="void and crowd excuse",
        ),
        pytest.param(
            *(row((5, 10), (6, 4), (0, 3), (7, 3)), [A, B, segment(7, OTHER, iscrowd=1)]),
            *(row((8, 10), (9, 10)), [P, Q], (2 / 3, 1, 2 / 3)),
            id="crowd of another category does not excuse",
        ),
        # A crowd region predicted perfectly is neither TP nor FP.
        pytest.param(
            *(row((5, 10), (7, 10)), [A, segment(7, THING, iscrowd=1)], row((8, 10), (9, 10)), [P, Q], (1, 1, 1)),
            id="crowd never matches",
        ),
        pytest.param(row((7, 10)), [segment(7, THING, iscrowd=1)], row((0, 10)), [], None, id="crowd is never missed"),
        # Id 4 is painted but not listed: that is not void, so an extra prediction there is an FP.
        pytest.param(
            *(row((5, 10), (4, 10)), [A], row((8, 10), (9, 10)), [P, Q], (2 / 3, 1, 2 / 3)),
            id="unlisted ground truth is not void",
        ),
    ],
)
def test_by_hand(gt, gt_segments, pred, pred_segments, expected):
    thing = score(gt, gt_segments, pred, pred_segments)["per_class"][THING]
    if expected is None:
        assert all(np.isnan(v) for v in thing.values())
    else:
        assert (thing["pq"], thing["sq"], thing["rq"]) == pytest.approx(expected)


def test_swapped_classes_score_nothing():
    ids = row((1, 4), (2, 4), (3, 4))
    gt = [segment(1, THING), segment(2, OTHER), segment(3, STUFF)]
    pred = [segment(1, OTHER), segment(2, THING), segment(3, STUFF)]
    result = score(ids, gt, ids, pred)
    assert result["Things"] == {"pq": 0, "sq": 0, "rq": 0, "n": 2}
    assert result["Stuff"] == {"pq": 1, "sq": 1, "rq": 1, "n": 1}
    assert result["All"]["pq"] == pytest.approx(1 / 3)


def test_categories_that_do_not_occur_are_left_out():
    ids = row((1, 4))
    result = score(ids, [segment(1)], ids, [segment(1)])
    assert result["All"] == {"pq": 1, "sq": 1, "rq": 1, "n": 1}
    assert result["Stuff"]["n"] == 0 and np.isnan(result["Stuff"]["pq"])


@pytest.mark.parametrize(
    ("pred", "pred_segments", "message"),
    [
        (row((1, 4), (2, 2)), [segment(1)], r"photo.jpg: 2 predicted pixels have an id .* does not list"),
        (row((1, 6)), [segment(1), segment(2)], r"photo.jpg: predicted segments \[2\] .* no pixel"),
        (row((1, 6)), [segment(1, 77)], r"photo.jpg: prediction: category ids \[77\] .* dataset's 3 categories"),
        (row((1, 5)), [segment(1)], r"photo.jpg: the prediction is \(1, 5\), the ground truth \(1, 6\)"),
    ],
)
def test_bad_predictions(pred, pred_segments, message):
    quality = PanopticQuality(categories=CATEGORIES)
    with pytest.raises(ValueError, match=message):
        quality.update(
            0,
            gt_ids=row((1, 6)),
            gt_segments=[segment(1)],
            pred_ids=pred,
            pred_segments=pred_segments,
            name="photo.jpg",
        )


def test_missing_prediction_file_entry(tmp_path):
    (tmp_path / "pred.json").write_text(json.dumps({"annotations": []}))
    with pytest.raises(ValueError, match="no prediction for image 0"):
        panoptic_quality_from_files(GOLDEN / "gt.json", GOLDEN / "gt", tmp_path / "pred.json", tmp_path)


def test_png_round_trip(tmp_path):
    ids = np.array([[0, 1, 255], [256, 65536, 2**24 - 1]])
    write_panoptic_png(tmp_path / "ids.png", ids)
    assert (read_panoptic_png(tmp_path / "ids.png") == ids).all()
    assert np.asarray(Image.open(tmp_path / "ids.png"))[1].tolist() == [[0, 1, 0], [0, 0, 1], [255, 255, 255]]
    Image.fromarray(ids.astype(np.uint8)).save(tmp_path / "gray.png")
    with pytest.raises(ValueError, match="gray.png: a panoptic PNG has 3 channels"):
        read_panoptic_png(tmp_path / "gray.png")
    with pytest.raises(FileNotFoundError, match="nothing.png"):
        read_panoptic_png(tmp_path / "nothing.png")


def test_equals_torchmetrics_without_crowds():
    torch = pytest.importorskip("torch")
    detection = pytest.importorskip("torchmetrics.detection")
    generator = np.random.default_rng(0)
    classes = generator.integers(1, 4, size=(12,))  # class of segment id 1..12
    oracle = detection.PanopticQuality(things={THING, OTHER}, stuffs={STUFF}, allow_unknown_preds_category=True)
    quality = PanopticQuality(categories=CATEGORIES)
    for image_id in range(4):
        gt = generator.integers(1, 13, size=(6, 7)).repeat(4, 0).repeat(4, 1)
        gt[classes[gt - 1] == STUFF] = 1 + np.flatnonzero(classes == STUFF)[0]  # one segment of a stuff class
        pred = np.roll(gt, 1, axis=1)
        pred[:6] = pred[6:12]
        maps, segments = [], []
        for ids in (pred, gt):
            maps.append(torch.from_numpy(np.stack([classes[ids - 1], ids], axis=-1))[None])
            segments.append([segment(int(i), int(classes[i - 1])) for i in np.unique(ids)])
        oracle.update(*maps)
        quality.update(image_id, gt_ids=gt, gt_segments=segments[1], pred_ids=pred, pred_segments=segments[0])
    assert 0.05 < quality.result()["All"]["pq"] < 0.95
    assert quality.result()["All"]["pq"] == pytest.approx(oracle.compute().item(), rel=1e-6)
