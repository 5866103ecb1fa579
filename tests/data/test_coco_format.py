"""Data of one's own in COCO's formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from ovseg_d2.data.datasets import (
    register_coco_instances,
    register_coco_panoptic,
    register_from_entries,
    register_semantic_folder,
)
from ovseg_d2.data.datasets.coco_format import metadata_from_categories
from tests.data.coded_data import CATEGORIES, SEGMENT_IDS, CodedData, forget, write_json


def test_panoptic_records(coded: CodedData) -> None:
    records = DatasetCatalog.get("coded_panoptic")
    assert [record["image_id"] for record in records] == [0, 1, 2]
    first = records[0]
    assert (first["height"], first["width"]) == (40, 60)
    for key, folder in (("file_name", "images"), ("pan_seg_file_name", "panoptic"), ("sem_seg_file_name", "semantic")):
        assert first[key] == str(coded.root / folder / "picture0.png")
    assert [s["category_id"] for s in first["segments_info"]] == [0, 1, 2, 3]
    assert [s["isthing"] for s in first["segments_info"]] == [False, True, True, False]
    assert [s["id"] for s in first["segments_info"]] == list(SEGMENT_IDS)


def test_metadata_of_categories() -> None:
    shuffled = [CATEGORIES[i] for i in (2, 0, 3, 1)]
    metadata = metadata_from_categories(shuffled)
    assert metadata["stuff_classes"] == ["far", "cat", "dog", "near"]
    assert metadata["stuff_dataset_id_to_contiguous_id"] == {3: 0, 13: 1, 23: 2, 33: 3}
    assert metadata["thing_classes"] == ["cat", "dog"]
    assert metadata["thing_dataset_id_to_contiguous_id"] == {13: 1, 23: 2}
    assert len({tuple(color) for color in metadata["stuff_colors"]}) == 4
    assert metadata["thing_colors"] == metadata["stuff_colors"][1:3]


def test_colors_of_the_file_are_used() -> None:
    category = {"id": 1, "name": "cat", "isthing": 1, "color": [1, 2, 3]}
    assert metadata_from_categories([category])["stuff_colors"] == [[1, 2, 3]]


def test_instance_records(coded: CodedData) -> None:
    records = DatasetCatalog.get("coded_instance")
    assert [annotation["category_id"] for annotation in records[0]["annotations"]] == [0, 1, 2, 3]
    metadata = MetadataCatalog.get("coded_instance")
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 13: 1, 23: 2, 33: 3}
    assert metadata.evaluator_type == "coco"


def test_semantic_records(coded: CodedData) -> None:
    records = DatasetCatalog.get("coded_semantic")
    assert [record["image_id"] for record in records] == ["picture0", "picture1", "picture2"]
    assert records[1]["sem_seg_file_name"] == str(coded.root / "semantic" / "picture1.png")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)


def test_category_outside_the_table(coded: CodedData) -> None:
    edit(coded.root / "panoptic.json", lambda c: c["annotations"][1]["segments_info"][2].update(category_id=99))
    with pytest.raises(
        ValueError, match=r"panoptic.json: segment 5 of picture1.png has category id 99, .*4 ids .*3..33"
    ):
        DatasetCatalog.get("coded_panoptic")


def test_instance_category_outside_the_table(coded: CodedData) -> None:
    edit(coded.root / "instances.json", lambda c: c["annotations"][0].update(category_id=99))
    with pytest.raises(ValueError, match=r"instances.json: .*category_id=99"):
        DatasetCatalog.get("coded_instance")


def test_annotation_of_an_unlisted_image(coded: CodedData) -> None:
    edit(coded.root / "panoptic.json", lambda c: c["annotations"][0].update(image_id=77))
    with pytest.raises(ValueError, match=r"picture0.png is of image id 77, which is not among 'images'"):
        DatasetCatalog.get("coded_panoptic")


def test_label_without_an_image(coded: CodedData) -> None:
    (coded.root / "images" / "picture1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"semantic/picture1.png has no image picture1\.\* in"):
        DatasetCatalog.get("coded_semantic")


def test_a_name_is_taken_once(coded: CodedData) -> None:
    with pytest.raises(ValueError, match="'coded_semantic' is registered already"):
        register_semantic_folder(name="coded_semantic", image_root="a", semantic_root="b", classes=["x"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"images": []}', "no 'categories'"),
        ('{"categories": [{"id": 1, "name": "cat"}]}', "no isthing"),
        (
            '{"categories": [{"id": 1, "name": "a", "isthing": 1}, {"id": 1, "name": "b", "isthing": 1}]}',
            "occurs twice",
        ),
    ],
)
def test_bad_panoptic_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "panoptic.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        register_coco_panoptic(name="bad", image_root="", panoptic_json=str(path), panoptic_root="")
    assert "bad" not in DatasetCatalog.list()


def test_missing_annotation_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"annotation file .*none.json does not exist"):
        register_coco_instances(name="bad", image_root="", instances_json=str(tmp_path / "none.json"))


def test_entries_of_a_configuration(coded: CodedData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(coded.root))
    entries = [
        {"kind": "panoptic", "name": "mine", "image_root": "images", "panoptic_json": "panoptic.json"}
        | {"panoptic_root": "panoptic"},
        {"kind": "semantic", "name": "mine_too", "image_root": "images", "semantic_root": str(coded.root / "semantic")}
        | {"classes": ["a", "b"]},
    ]
    try:
        register_from_entries(entries)
        register_from_entries(entries)  # a second set-up in the same process
        assert DatasetCatalog.get("mine")[0]["file_name"] == str(coded.root / "images" / "picture0.png")
        assert len(DatasetCatalog.get("mine_too")) == 3
    finally:
        forget("mine")
        forget("mine_too")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"kind": "video", "name": "x"},
            r"REGISTER\[0\]: kind is 'video'; expected one of panoptic, instance, semantic",
        ),
        ({"name": "x"}, r"REGISTER\[0\]: kind is None"),
        ({"kind": "semantic", "name": "x", "classes": ["a"]}, r"REGISTER\[0\] \(semantic\): .*'image_root'"),
    ],
)
def test_bad_entries(entry: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_from_entries([entry])
