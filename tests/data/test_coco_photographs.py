"""Two real COCO photographs with their panoptic annotation, where they lie beside the repository."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ovseg_d2.data import OVSegDatasetMapper, build_test_loader, build_train_loader, check_dataset
from ovseg_d2.data.check import load_dataset_dicts
from ovseg_d2.data.datasets import register_coco_panoptic
from ovseg_d2.data.datasets.class_tables import class_table
from tests.data.coded_data import data_cfg, forget

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_panoptic_sample"
pytestmark = pytest.mark.skipif(not SAMPLE.is_dir(), reason="the COCO photographs are not there")
COCO = ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 133, "MODEL.OVSEG.TEST.TASKS", ["panoptic"])


@pytest.fixture(autouse=True)
def photographs() -> Iterator[None]:
    register_coco_panoptic(
        name="photographs",
        image_root=str(SAMPLE / "input_images"),
        panoptic_json=str(SAMPLE / "panoptic_examples.json"),
        panoptic_root=str(SAMPLE / "panoptic_examples"),
        categories=class_table("coco_panoptic"),
    )
    yield
    forget("photographs")


def mapped(*overrides: Any) -> list[dict[str, Any]]:
    mapper = OVSegDatasetMapper(data_cfg("photographs", *COCO, *overrides), is_train=True)
    return [mapper(record) for record in load_dataset_dicts("photographs", filter_empty=False)]


def test_check() -> None:
    check_dataset(data_cfg("photographs", *COCO), "photographs")


def test_masks_have_the_areas_of_the_annotation() -> None:
    content = json.loads((SAMPLE / "panoptic_examples.json").read_text())
    ids = {category["id"]: i for i, category in enumerate(class_table("coco_panoptic"))}
    for result, annotation in zip(mapped(), content["annotations"], strict=True):
        instances = result["instances"]
        segments = [s for s in annotation["segments_info"] if not s["iscrowd"]]
        assert instances.gt_classes.tolist() == [ids[s["category_id"]] for s in segments]
        assert instances.gt_masks.tensor.sum(dim=(1, 2)).tolist() == [s["area"] for s in segments]
        labelled = sum(s["area"] for s in annotation["segments_info"])  # crowds have a class too
        assert int((result["sem_seg"] != 255).sum()) == labelled


def test_a_crowd_is_in_the_labels_but_no_instance() -> None:
    """The first photograph has one region of people that are not told apart."""
    result = mapped()[0]
    person = result["sem_seg"] == 0
    instances = result["instances"].gt_masks.tensor[result["instances"].gt_classes == 0].any(dim=0)
    assert int((person & ~instances).sum()) == 24295 and not (instances & ~person).any()


def test_public_training_pipeline() -> None:
    lsj = ["INPUT.PIPELINE", "lsj", "INPUT.IMAGE_SIZE", 256, "INPUT.RANDOM_FLIP", "horizontal"]
    for result in mapped(*lsj):
        masks = result["instances"].gt_masks.tensor
        assert tuple(result["image"].shape) == (3, 256, 256) == (3, *result["sem_seg"].shape)
        assert masks.flatten(1).any(dim=1).all() and int(masks.sum(dim=0).max()) <= 1
        for class_id, mask in zip(result["instances"].gt_classes, masks, strict=True):
            assert (result["sem_seg"][mask] == class_id).all()


def test_semantic_targets_are_one_mask_a_class() -> None:
    panoptic, semantic = mapped(), mapped("INPUT.TARGETS", "semantic")
    for a, b in zip(panoptic, semantic, strict=True):
        assert (a["sem_seg"] == b["sem_seg"]).all()
        assert b["instances"].gt_classes.tolist() == sorted(set(a["sem_seg"].unique().tolist()) - {255})


def test_loaders() -> None:
    cfg = data_cfg("photographs", *COCO, "INPUT.MIN_SIZE_TEST", 120)
    batch = next(iter(build_train_loader(cfg)))
    assert {record["image_id"] for record in batch} == {142238, 439180}
    for inputs in build_test_loader(cfg, "photographs"):
        (record,) = inputs
        assert record["image"].shape[1] == 120
        original = np.asarray(Image.open(record["file_name"]))
        assert original.shape[:2] == (record["height"], record["width"])
