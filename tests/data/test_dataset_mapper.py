"""The mapper: masks and labels lie on the picture, whatever the pipeline did to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks
from PIL import Image

from ovseg_d2.data import OVSegDatasetMapper
from ovseg_d2.data.check import load_dataset_dicts
from tests.data.coded_data import CROWD_CLASS, IGNORE, NAMES, CodedData, data_cfg, read_classes

PIPELINES = {
    "as it is": [],
    "flip": ["INPUT.RANDOM_FLIP", "horizontal"],
    "vertical flip": ["INPUT.RANDOM_FLIP", "vertical"],
    "enlarge": ["INPUT.MIN_SIZE_TRAIN", (97,)],
    "shrink": ["INPUT.MIN_SIZE_TRAIN", (23,)],
    "lsj": [
        *("INPUT.PIPELINE", "lsj", "INPUT.IMAGE_SIZE", 48, "INPUT.MIN_SCALE", 0.5, "INPUT.MAX_SCALE", 2.0),
        *("INPUT.RANDOM_FLIP", "horizontal"),
    ],
    "crop": [
        *("INPUT.PIPELINE", "crop", "INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute"),
        *("INPUT.CROP.SIZE", [32, 32], "INPUT.PAD_SIZE", 40, "INPUT.RANDOM_FLIP", "horizontal"),
        *("INPUT.MIN_SIZE_TRAIN", (24, 41, 66)),
    ],
    "crop by class": [
        *("INPUT.PIPELINE", "crop", "INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute"),
        *("INPUT.CROP.SIZE", [20, 20], "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 0.75),
    ],
}


def mapped(kind: str, *overrides: Any, repeat: int = 6) -> list[dict[str, Any]]:
    """All pictures of the coded data through the training mapper, ``repeat`` times."""
    cfg = data_cfg(f"coded_{kind}", "INPUT.TARGETS", kind, *overrides)
    mapper = OVSegDatasetMapper(cfg, is_train=True)
    records = load_dataset_dicts(f"coded_{kind}", filter_empty=False)
    return [mapper(record) for _ in range(repeat) for record in records]


def masks_by_class(result: dict[str, Any]) -> dict[int, np.ndarray]:
    instances = result["instances"]
    assert isinstance(instances.gt_masks, BitMasks)
    assert instances.image_size == tuple(result["image"].shape[1:])
    assert instances.gt_classes.dtype == torch.int64
    assert instances.gt_masks.tensor.dtype == torch.bool
    classes = instances.gt_classes.tolist()
    assert len(set(classes)) == len(classes)
    return {c: mask.numpy() for c, mask in zip(classes, instances.gt_masks.tensor, strict=True)}


@pytest.mark.parametrize(
    ("kind", "pipeline"),
    [
        (kind, pipeline)
        for kind in ("panoptic", "semantic", "instance")
        for pipeline in PIPELINES
        if (kind, pipeline) != ("instance", "crop by class")  # instance data have no labels to choose the crop by
    ],
)
def test_targets_lie_on_the_picture(coded: CodedData, kind: str, pipeline: str) -> None:
    for result in mapped(kind, *PIPELINES[pipeline]):
        assert result["image"].dtype == torch.uint8
        shown = read_classes(result["image"])
        if kind != "instance":
            assert result["sem_seg"].dtype == torch.int64
            np.testing.assert_array_equal(result["sem_seg"], shown)
        masks = masks_by_class(result)
        # No crowd among the instances; a semantic mask covers its class, crowds or not.
        expected = set(np.unique(shown)) - {IGNORE} - (set() if kind == "semantic" else {CROWD_CLASS})
        if kind != "instance":
            assert set(masks) == expected
        for class_id, mask in masks.items():
            differs = int((mask != (shown == class_id)).sum())
            # A polygon is filled by the corners it has after the transform: at most a pixel along its outline differs.
            allowed = sum(mask.shape) if kind == "instance" and class_id == 1 else 0
            assert differs <= allowed


@pytest.mark.parametrize("kind", ["panoptic", "instance"])
def test_what_the_crop_removed_can_stay_a_target(coded: CodedData, kind: str) -> None:
    small_crop = [*PIPELINES["crop"], "INPUT.CROP.SIZE", [12, 12]]
    everything = mapped(kind, repeat=1)
    numbers = {r["image_id"]: len(r["instances"]) for r in everything}
    kept = mapped(kind, *small_crop, "INPUT.KEEP_EMPTY_MASKS", True)
    assert all(len(r["instances"]) == numbers[r["image_id"]] for r in kept)
    assert any(not mask.any() for r in kept for mask in r["instances"].gt_masks.tensor)
    dropped = mapped(kind, *small_crop)
    assert all(mask.any() for r in dropped for mask in r["instances"].gt_masks.tensor)


def test_padding_is_gray_and_ignored(coded: CodedData) -> None:
    overrides = ["INPUT.PIPELINE", "lsj", "INPUT.IMAGE_SIZE", 80, "INPUT.MIN_SCALE", 0.5, "INPUT.MAX_SCALE", 0.5]
    for result in mapped("panoptic", *overrides, repeat=1):
        assert tuple(result["image"].shape) == (3, 80, 80)
        assert (result["image"][:, -1, -1] == 128).all()
        assert result["sem_seg"][-1, -1] == IGNORE
        assert not result["instances"].gt_masks.tensor[:, -1, -1].any()


def test_sizes_of_the_pipelines(coded: CodedData) -> None:
    assert {tuple(r["image"].shape[1:]) for r in mapped("panoptic", *PIPELINES["crop"])} == {(40, 40)}
    assert {tuple(r["image"].shape[1:]) for r in mapped("panoptic", *PIPELINES["lsj"])} == {(48, 48)}
    assert {min(r["image"].shape[1:]) for r in mapped("panoptic", *PIPELINES["shrink"])} == {23}


def test_without_augmentation_nothing_is_random(coded: CodedData) -> None:
    first, second = mapped("panoptic", repeat=1), mapped("panoptic", repeat=1)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_masks.tensor, b["instances"].gt_masks.tensor)


def test_fields_and_untouched_record(coded: CodedData) -> None:
    record = load_dataset_dicts("coded_panoptic", filter_empty=False)[1]
    before = repr(record)
    result = OVSegDatasetMapper(data_cfg("coded_panoptic"), is_train=True)(record)
    assert repr(record) == before
    assert (result["height"], result["width"]) == (61, 45)
    assert (result["image_id"], result["dataset_name"]) == (1, "coded_panoptic")
    assert result["file_name"].endswith("picture1.png")


def test_evaluation_gives_the_image_only(coded: CodedData) -> None:
    cfg = data_cfg("coded_panoptic", "INPUT.MIN_SIZE_TEST", 20, "INPUT.MAX_SIZE_TEST", 100)
    record = load_dataset_dicts("coded_panoptic", filter_empty=False)[0]
    result = OVSegDatasetMapper(cfg, is_train=False)(record)
    assert tuple(result["image"].shape) == (3, 20, 30)
    assert (result["height"], result["width"]) == (40, 60)
    assert "instances" not in result and "sem_seg" not in result
    assert result["segments_info"] == record["segments_info"]


def test_bgr_is_rgb_reversed(coded: CodedData) -> None:
    rgb, bgr = (mapped("panoptic", "INPUT.FORMAT", f, repeat=1)[0]["image"] for f in ("RGB", "BGR"))
    assert torch.equal(rgb, bgr.flip(0)) and not torch.equal(rgb, bgr)


def test_own_ignore_label_becomes_the_configured_one(coded: CodedData) -> None:
    expected = mapped("semantic", repeat=1)[0]["sem_seg"]
    result = mapped("semantic", "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 65_535, repeat=1)[0]["sem_seg"]
    assert torch.equal(result == 65_535, expected == IGNORE) and not (result == IGNORE).any()


def test_semantic_targets_of_a_panoptic_data_set(coded: CodedData) -> None:
    cfg = data_cfg("coded_panoptic", "INPUT.TARGETS", "semantic")
    record = load_dataset_dicts("coded_panoptic", filter_empty=False)[0]
    result = OVSegDatasetMapper(cfg, is_train=True)(record)
    np.testing.assert_array_equal(result["sem_seg"], read_classes(result["image"]))
    assert set(masks_by_class(result)) == set(range(len(NAMES)))


def test_bitmap_masks(coded: CodedData) -> None:
    record = load_dataset_dicts("coded_instance", filter_empty=False)[0]
    shown = read_classes(mapped("instance", repeat=1)[0]["image"])
    annotation = {"category_id": 2, "segmentation": shown == 2, "iscrowd": 0}
    cfg = data_cfg("coded_instance", "INPUT.TARGETS", "instance", *PIPELINES["enlarge"])
    result = OVSegDatasetMapper(cfg, is_train=True)({**record, "annotations": [annotation]})
    np.testing.assert_array_equal(masks_by_class(result)[2], read_classes(result["image"]) == 2)


def test_an_image_may_have_no_targets(coded: CodedData) -> None:
    cfg = data_cfg("coded_instance", "INPUT.TARGETS", "instance")
    record = load_dataset_dicts("coded_instance", filter_empty=False)[0]
    result = OVSegDatasetMapper(cfg, is_train=True)({**record, "annotations": []})
    assert tuple(result["instances"].gt_masks.tensor.shape) == (0, 40, 60)
    assert tuple(result["instances"].gt_classes.shape) == (0,)


def _wrong_category(record: dict) -> dict:
    return {**record, "annotations": [{**record["annotations"][0], "category_id": 4}]}


def _small_mask(record: dict) -> dict:
    return {**record, "annotations": [{**record["annotations"][0], "segmentation": np.ones((3, 4), bool)}]}


def _no_mask(record: dict) -> dict:
    return {**record, "annotations": [{"category_id": 0}]}


@pytest.mark.parametrize(
    ("kind", "spoil", "words"),
    [
        ("instance", _wrong_category, ["picture0.png", "category 4", "expected 0..3"]),
        ("instance", _small_mask, ["picture0.png", "3 x 4", "expected 40 x 60"]),
        ("instance", _no_mask, ["picture0.png", "NoneType", "expected polygons"]),
        ("panoptic", lambda r: {**r, "height": 99}, ["picture0.png", "40 x 60", "expected 99 x 60"]),
        ("panoptic", lambda r: {**r, "pan_seg_file_name": r["sem_seg_file_name"]}, ["1 channel", "panoptic PNG"]),
        ("semantic", lambda r: {**r, "sem_seg_file_name": r["file_name"]}, ["3 channels", "expected 1"]),
        (
            "panoptic",
            lambda r: {"file_name": r["file_name"], "dataset_name": "coded_panoptic"},
            ["no pan_seg_file_name"],
        ),
    ],
)
def test_bad_annotations(coded: CodedData, kind: str, spoil: Callable[[dict], dict], words: list[str]) -> None:
    mapper = OVSegDatasetMapper(data_cfg(f"coded_{kind}", "INPUT.TARGETS", kind), is_train=True)
    with pytest.raises(ValueError) as caught:
        mapper(spoil(load_dataset_dicts(f"coded_{kind}", filter_empty=False)[0]))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_label_file_of_another_size(coded: CodedData) -> None:
    record = load_dataset_dicts("coded_semantic", filter_empty=False)[0]
    other = str(coded.root / "semantic" / "picture1.png")
    mapper = OVSegDatasetMapper(data_cfg("coded_semantic", "INPUT.TARGETS", "semantic"), is_train=True)
    with pytest.raises(ValueError, match=r"picture1.png is 61 x 45 .*expected 40 x 60 .*picture0.png"):
        mapper({**record, "sem_seg_file_name": other})


def test_label_outside_the_table(coded: CodedData) -> None:
    path = coded.root / "semantic" / "picture0.png"
    labels = np.asarray(Image.open(path)).copy()
    labels[0, 0] = 77
    Image.fromarray(labels).save(path)
    with pytest.raises(
        ValueError, match=r"picture0.png has label 77 \(1 pixel\), expected 0..3 or the ignore label 255"
    ):
        mapped("semantic")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["INPUT.TARGETS", "boxes"], r"INPUT.TARGETS is 'boxes'; expected one of panoptic, semantic, instance"),
        (["INPUT.PIPELINE", "rotate"], r"INPUT.PIPELINE is 'rotate'; expected one of lsj, crop, resize"),
        (["INPUT.RANDOM_FLIP", "sideways"], r"INPUT.RANDOM_FLIP is 'sideways'; expected none, horizontal or vertical"),
        (["DATALOADER.ON_CORRUPT_IMAGE", "ignore"], r"DATALOADER.ON_CORRUPT_IMAGE is 'ignore'; expected skip or raise"),
        (["MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 2], r"IGNORE_VALUE is 2, a class of dataset 'coded_panoptic'.*0..3"),
        (["INPUT.FORMAT", "L", "INPUT.COLOR_AUG_SSD", True], r"INPUT.FORMAT is 'L'; .*RGB or BGR"),
    ],
)
def test_bad_configuration(coded: CodedData, overrides: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OVSegDatasetMapper(data_cfg("coded_panoptic", *overrides), is_train=True)


def test_padding_smaller_than_the_picture(coded: CodedData) -> None:
    with pytest.raises(ValueError, match=r"INPUT.PAD_SIZE is 30 but an image is 40 x 60"):
        mapped("panoptic", "INPUT.PIPELINE", "crop", "INPUT.PAD_SIZE", 30)


def test_crop_by_class_needs_semantic_labels(coded: CodedData) -> None:
    with pytest.raises(ValueError, match=r"SINGLE_CATEGORY_MAX_AREA .*expected INPUT.TARGETS panoptic or semantic"):
        mapped("instance", *PIPELINES["crop by class"])


def test_crop_by_class_limits_the_share(coded: CodedData) -> None:
    def largest_share(result: dict[str, Any]) -> float:
        labels = result["sem_seg"][result["sem_seg"] != IGNORE]
        return float(torch.bincount(labels).max() / len(labels))

    limited = [largest_share(result) for result in mapped("panoptic", *PIPELINES["crop by class"], repeat=20)]
    free = PIPELINES["crop by class"][:-2]
    unlimited = [largest_share(result) for result in mapped("panoptic", *free, repeat=20)]
    # The search gives up after ten windows, so a few may exceed the limit.
    assert np.mean(np.array(limited) > 0.75) < 0.1 < np.mean(np.array(unlimited) > 0.75)
