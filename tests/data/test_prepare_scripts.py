"""The scripts that convert COCO and ADE20K, on tiny copies of their layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from ovseg_d2.data.datasets.class_tables import class_table
from ovseg_d2.data.datasets.coco_format import load_coco_instances, load_coco_panoptic, metadata_from_categories
from tests.data.coded_data import CodedData, forget

Script = Callable[[str], ModuleType]
ADE_NAMES = [category["name"] for category in class_table("ade20k_150")]
SKY, BED, FLAG = ADE_NAMES.index("sky"), ADE_NAMES.index("bed"), ADE_NAMES.index("flag")


def test_semantic_labels_of_panoptic_files(script: Script, coded: CodedData, root: Path) -> None:
    output = root / "made"
    main = script("prepare_coco").main
    arguments = ["--panoptic-json", str(coded.root / "panoptic.json"), "--panoptic-root", str(coded.root / "panoptic")]
    main([*arguments, "--output", str(output), "--workers", "1"])
    for path in (coded.root / "semantic").iterdir():
        np.testing.assert_array_equal(np.asarray(Image.open(output / path.name)), np.asarray(Image.open(path)))
    # Finished files stay, missing ones are made, --force makes all.
    Image.new("L", (1, 1)).save(output / "picture0.png")
    (output / "picture1.png").unlink()
    main([*arguments, "--output", str(output), "--workers", "1"])
    assert Image.open(output / "picture0.png").size == (1, 1) and Image.open(output / "picture1.png").size == (45, 61)
    main([*arguments, "--output", str(output), "--workers", "1", "--force"])
    assert Image.open(output / "picture0.png").size == (60, 40)


def test_coco_layout(script: Script, coded: CodedData, root: Path) -> None:
    (root / "coco" / "annotations").mkdir(parents=True)
    (coded.root / "panoptic.json").rename(root / "coco" / "annotations" / "panoptic_val2017.json")
    (coded.root / "panoptic").rename(root / "coco" / "panoptic_val2017")
    script("prepare_coco").main(["--splits", "val", "--workers", "2"])
    assert len(list((root / "coco" / "panoptic_semseg_val2017").glob("*.png"))) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--output", "x"], ValueError, "belong together"),
        (["--splits", "val"], FileNotFoundError, "panoptic_val2017.json does not exist"),
    ],
)
def test_prepare_coco_errors(
    script: Script, root: Path, arguments: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        script("prepare_coco").main(arguments)


def write_ade(root: Path, thing_numbers: tuple[int, int]) -> Path:
    """One validation image: sky, of which 3 rows are unlabelled, with two beds and a flag over it."""
    base = root / "ADEChallengeData2016"
    labels = np.full((12, 16), SKY + 1, np.uint8)
    labels[9:] = 0
    instance = np.zeros((12, 16, 3), np.uint8)
    for number, (rows, columns, class_id) in enumerate(
        [(slice(0, 4), slice(0, 5), BED), (slice(2, 6), slice(5, 9), BED), (slice(5, 8), slice(10, 14), FLAG)]
    ):
        labels[rows, columns] = class_id + 1
        instance[rows, columns, 0] = thing_numbers[class_id == FLAG]
        instance[rows, columns, 1] = number + 1
    for folder, content, suffix in (
        ("images", np.zeros((12, 16, 3), np.uint8), "jpg"),
        ("annotations", labels, "png"),
        ("annotations_instance", instance, "png"),
    ):
        (base / folder / "validation").mkdir(parents=True)
        Image.fromarray(content).save(base / folder / "validation" / f"ADE_val_00000001.{suffix}")
    return base


def test_ade20k(script: Script, root: Path) -> None:
    base = write_ade(root, (1, 100))
    script("prepare_ade20k").main(["--splits", "val", "--workers", "1"])

    semantic = np.asarray(Image.open(base / "annotations_detectron2" / "validation" / "ADE_val_00000001.png"))
    assert semantic[0, 15] == SKY and semantic[0, 0] == BED and semantic[11, 0] == 255 and semantic[6, 12] == FLAG

    table = metadata_from_categories(class_table("ade20k_150"))
    (record,) = load_coco_panoptic(
        panoptic_json=str(base / "ade20k_panoptic_val.json"),
        image_root="images",
        panoptic_root=str(base / "ade20k_panoptic_val"),
        semantic_root=None,
        contiguous_ids=table["stuff_dataset_id_to_contiguous_id"],
        thing_ids=table["thing_dataset_id_to_contiguous_id"],
    )
    assert record["file_name"] == "images/ADE_val_00000001.jpg" and record["image_id"] == "ADE_val_00000001"
    assert [(s["category_id"], s["isthing"]) for s in record["segments_info"]] == [
        (SKY, False),
        (BED, True),
        (BED, True),
        (FLAG, True),
    ]
    ids = np.asarray(Image.open(record["pan_seg_file_name"]))[..., 0]
    assert [int((ids == s["id"]).sum()) for s in record["segments_info"]] == [
        s["area"] for s in record["segments_info"]
    ]
    assert [s["area"] for s in record["segments_info"]] == [9 * 16 - 20 - 16 - 12, 20, 16, 12]
    assert record["segments_info"][2]["bbox"] == [5, 2, 4, 4]
    assert (ids[9:] == 0).all()

    try:
        (instances,) = load_coco_instances("ade_made", str(base / "ade20k_instance_val.json"), "images")
    finally:
        forget("ade_made")
    assert [a["category_id"] for a in instances["annotations"]] == [0, 0, 99]
    np.testing.assert_array_equal(mask_util.decode(instances["annotations"][2]["segmentation"]), ids == 4)


def test_ade20k_semantic_only(script: Script, root: Path) -> None:
    base = write_ade(root, (1, 100))
    script("prepare_ade20k").main(["--splits", "val", "--only", "semantic", "--workers", "1"])
    assert (base / "annotations_detectron2" / "validation" / "ADE_val_00000001.png").exists()
    assert not (base / "ade20k_panoptic_val.json").exists()


def test_ade20k_instances_of_another_numbering(script: Script, root: Path) -> None:
    write_ade(root, (7, 9))
    with pytest.raises(ValueError, match=r"annotations_instance: only 0 % .*order of the 150 classes"):
        script("prepare_ade20k").main(["--splits", "val", "--workers", "1"])


def test_ade20k_missing(script: Script, root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ADEChallengeData2016/images/training does not exist"):
        script("prepare_ade20k").main([])


@pytest.mark.parametrize("name", ["prepare_ovshapes", "prepare_coco", "prepare_ade20k"])
def test_help_teaches(script: Script, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script(name).main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "examples:" in text and "DETECTRON2_DATASETS" in text and f"python datasets/{name}.py" in text


def test_ade20k_annotation_is_json(script: Script, root: Path) -> None:
    base = write_ade(root, (1, 100))
    script("prepare_ade20k").main(["--splits", "val", "--workers", "1"])
    content = json.loads((base / "ade20k_instance_val.json").read_text())
    assert len(content["categories"]) == 100 and content["categories"][0] == {"id": BED, "name": "bed"}
    assert all(a["iscrowd"] == 0 and a["image_id"] == "ADE_val_00000001" for a in content["annotations"])
