"""COCO and ADE20K registrations."""

from __future__ import annotations

import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES, COCO_CATEGORIES

from ovseg_d2.data.datasets import dataset_root
from ovseg_d2.data.datasets.class_tables import class_table


def test_coco_table_is_cocos() -> None:
    table = [{key: category[key] for key in ("id", "name", "isthing", "color")} for category in COCO_CATEGORIES]
    assert class_table("coco_panoptic") == table
    assert len(table) == 133


def test_ade20k_table() -> None:
    table = class_table("ade20k_150")
    assert [category["name"] for category in table] == [name.strip() for name in ADE20K_SEM_SEG_CATEGORIES]
    assert [category["id"] for category in table] == list(range(150))
    assert sum(category["isthing"] for category in table) == 100
    things = {category["name"] for category in table if category["isthing"]}
    assert {"bed", "person", "car", "flag", "traffic light"} <= things
    assert things.isdisjoint({"wall", "sky", "tree", "house", "tower", "lake"})


def below_root(*parts: str) -> str:
    return os.path.join(dataset_root(), *parts)


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_panoptic(split: str) -> None:
    metadata = MetadataCatalog.get(f"coco_2017_{split}_panoptic_with_sem_seg")
    assert metadata.image_root == below_root("coco", f"{split}2017")
    assert metadata.panoptic_root == below_root("coco", f"panoptic_{split}2017")
    assert metadata.panoptic_json == below_root("coco", "annotations", f"panoptic_{split}2017.json")
    assert metadata.sem_seg_root == below_root("coco", f"panoptic_semseg_{split}2017")
    assert metadata.json_file == below_root("coco", "annotations", f"instances_{split}2017.json")
    assert (metadata.evaluator_type, metadata.ignore_label, metadata.label_divisor) == ("coco_panoptic_seg", 255, 1000)
    assert len(metadata.stuff_classes) == 133 and len(metadata.thing_classes) == 80
    assert (
        metadata.stuff_dataset_id_to_contiguous_id[200] == 132 and metadata.thing_dataset_id_to_contiguous_id[90] == 79
    )
    assert 200 not in metadata.thing_dataset_id_to_contiguous_id


@pytest.mark.parametrize(("split", "folder"), [("train", "training"), ("val", "validation")])
def test_ade20k(split: str, folder: str) -> None:
    base = below_root("ADEChallengeData2016")
    panoptic = MetadataCatalog.get(f"ade20k_panoptic_{split}")
    assert panoptic.image_root == os.path.join(base, "images", folder)
    assert panoptic.panoptic_root == os.path.join(base, f"ade20k_panoptic_{split}")
    assert panoptic.panoptic_json == panoptic.panoptic_root + ".json"
    assert panoptic.sem_seg_root == os.path.join(base, "annotations_detectron2", folder)
    assert panoptic.evaluator_type == "ade20k_panoptic_seg" and panoptic.label_divisor == 1000
    assert panoptic.stuff_dataset_id_to_contiguous_id == {i: i for i in range(150)}
    assert all(dataset_id == index for dataset_id, index in panoptic.thing_dataset_id_to_contiguous_id.items())

    instance = MetadataCatalog.get(f"ade20k_instance_{split}")
    assert instance.json_file == panoptic.json_file == os.path.join(base, f"ade20k_instance_{split}.json")
    assert instance.evaluator_type == "coco" and len(instance.thing_classes) == 100
    assert instance.thing_dataset_id_to_contiguous_id[7] == 0 and instance.thing_dataset_id_to_contiguous_id[149] == 99
    assert instance.thing_classes[0] == "bed" and instance.thing_classes[99] == "flag"

    semantic = MetadataCatalog.get(f"ade20k_sem_seg_{split}")
    assert len(semantic.stuff_colors) == 150


def test_detectron2s_own_names_are_left_alone() -> None:
    assert {"coco_2017_train", "ade20k_sem_seg_val", "cityscapes_fine_panoptic_train"} <= set(DatasetCatalog.list())
    assert MetadataCatalog.get("coco_2017_train").json_file.endswith("instances_train2017.json")
