"""What is checked before a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg

from ovseg_d2.data import check_dataset
from ovseg_d2.data.datasets import register_semantic_folder
from tests.data.coded_data import NAMES, CodedData, data_cfg, forget, write_json

ALL_TASKS = ["MODEL.OVSEG.TEST.TASKS", ["semantic", "panoptic", "instance"]]


@pytest.mark.parametrize("kind", ["panoptic", "semantic", "instance"])
def test_good_data(coded: CodedData, kind: str) -> None:
    check_dataset(data_cfg(f"coded_{kind}", *ALL_TASKS), f"coded_{kind}")


def edit_segments(coded: CodedData) -> None:
    path = coded.root / "panoptic.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segments_info"][0]["category_id"] = 4711
    write_json(path, content)


def remove(*parts: str) -> Callable[[CodedData], None]:
    def run(coded: CodedData) -> None:
        path = coded.root.joinpath(*parts)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return run


@pytest.mark.parametrize(
    ("kind", "damage", "error", "words"),
    [
        (
            "panoptic",
            remove("images"),
            FileNotFoundError,
            ["folder", "images", "does not exist", "DETECTRON2_DATASETS"],
        ),
        ("panoptic", remove("panoptic"), FileNotFoundError, ["folder", "panoptic"]),
        ("panoptic", remove("semantic"), FileNotFoundError, ["folder", "semantic"]),
        ("panoptic", remove("panoptic.json"), FileNotFoundError, ["annotation file", "panoptic.json"]),
        ("instance", remove("instances.json"), FileNotFoundError, ["annotation file", "instances.json"]),
        ("semantic", remove("semantic"), FileNotFoundError, ["folder", "semantic"]),
        ("panoptic", remove("images", "picture1.png"), FileNotFoundError, ["picture1.png", "panoptic.json", "1 of 3"]),
        ("instance", remove("images", "picture1.png"), FileNotFoundError, ["picture1.png", "instances.json", "1 of 3"]),
        ("semantic", remove("images", "picture1.png"), FileNotFoundError, ["semantic/picture1.png", "no image"]),
        ("panoptic", remove("panoptic", "picture2.png"), FileNotFoundError, ["panoptic/picture2.png", "1 of 3"]),
        ("panoptic", remove("semantic", "picture2.png"), FileNotFoundError, ["semantic/picture2.png", "1 of 3"]),
        ("panoptic", edit_segments, ValueError, ["4711", "3..33", "panoptic.json"]),
    ],
)
def test_damaged_data(
    coded: CodedData, kind: str, damage: Callable[[CodedData], None], error: type[Exception], words: list[str]
) -> None:
    damage(coded)
    with pytest.raises(error) as caught:
        check_dataset(data_cfg(f"coded_{kind}", *ALL_TASKS), f"coded_{kind}")
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_label_images_are_needed_only_to_evaluate_them(coded: CodedData) -> None:
    shutil.rmtree(coded.root / "semantic")
    check_dataset(data_cfg("coded_panoptic", "MODEL.OVSEG.TEST.TASKS", ["panoptic"]), "coded_panoptic")


def test_unknown_name(coded: CodedData) -> None:
    with pytest.raises(ValueError, match=r"dataset 'ovshapes_vol' is not registered; did you mean ovshapes_val"):
        check_dataset(data_cfg("coded_panoptic"), ("coded_panoptic", "ovshapes_vol"))


def test_number_of_classes(coded: CodedData) -> None:
    overrides: list[Any] = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5]
    with pytest.raises(ValueError, match=r"NUM_CLASSES is 5, but dataset 'coded_panoptic' has 4 classes"):
        check_dataset(data_cfg("coded_panoptic", *overrides), "coded_panoptic")
    # A model of an open vocabulary takes the classes of each dataset.
    check_dataset(data_cfg("coded_panoptic", *overrides, "MODEL.META_ARCHITECTURE", "Open"), "coded_panoptic")


@pytest.mark.parametrize(
    ("options", "closed_in_training", "closed_at_test"),
    [
        ([], True, True),
        (["MODEL.OVSEG.MTA_CLIP.SCORE", "similarity"], True, False),
        (["MODEL.OVSEG.MTA_CLIP.TEXT_ENHANCED", False, "MODEL.OVSEG.PROPOSALS.CLASS_HEAD", "embed"], False, False),
    ],
)
def test_mta_clip_is_closed_where_its_head_classifies(
    coded: CodedData, options: list[Any], closed_in_training: bool, closed_at_test: bool
) -> None:
    overrides = ["MODEL.META_ARCHITECTURE", "MTACLIP", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5, *options]
    trained = data_cfg("coded_panoptic", *overrides)
    tested = data_cfg("coded_panoptic", *overrides, "DATASETS.TRAIN", ())
    for cfg, closed in ((trained, closed_in_training), (tested, closed_at_test)):
        with pytest.raises(ValueError, match="NUM_CLASSES is 5") if closed else nullcontext():
            check_dataset(cfg, "coded_panoptic")


def test_closed_vocabulary_needs_the_same_names(coded: CodedData) -> None:
    folders = {"image_root": str(coded.root / "images"), "semantic_root": str(coded.root / "semantic")}
    register_semantic_folder(name="other", classes=("far", "cat", "cow", "near"), **folders)
    try:
        with pytest.raises(ValueError, match=r"class 2 is 'dog' in dataset 'coded_panoptic' and 'cow' in 'other'"):
            check_dataset(data_cfg("coded_panoptic"), ("coded_panoptic", "other"))
    finally:
        forget("other")


def test_pairs_that_detectron2_drops(coded: CodedData) -> None:
    """detectron2's reader of label folders leaves out labels without an image; that must not go unnoticed."""
    images, labels = str(coded.root / "images"), str(coded.root / "semantic")
    DatasetCatalog.register("paired", lambda: load_sem_seg(labels, images, gt_ext="png", image_ext="png"))
    MetadataCatalog.get("paired").set(
        stuff_classes=list(NAMES), image_root=images, sem_seg_root=labels, evaluator_type="sem_seg", ignore_label=255
    )
    try:
        check_dataset(data_cfg("paired"), "paired")
        (coded.root / "images" / "picture0.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"semantic/picture0.png has no image in .*1 of 3 labels"):
            check_dataset(data_cfg("paired"), "paired")
    finally:
        forget("paired")
