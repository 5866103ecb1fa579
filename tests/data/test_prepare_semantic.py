"""The scripts that convert COCO-Stuff, VOC, Pascal Context and the full ADE20K, on tiny copies of the downloads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.io
from PIL import Image

from ovseg_d2.data.datasets.class_tables import class_names, class_table
from ovseg_d2.data.image_io import read_image

Script = Callable[[str], ModuleType]
ONE_PROCESS = ["--workers", "1"]


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_coco_stuff(script: Script, root: Path) -> None:
    source = root / "coco" / "stuffthingmaps" / "val2017"
    # person, stop sign (category 13), cow (21), wood (182), unlabelled
    save(source / "1.png", np.array([[0, 12, 20, 181, 255]], np.uint8))
    main = script("prepare_coco_stuff").main
    main(["--splits", "val", *ONE_PROCESS])
    made = root / "coco" / "stuffthingmaps_detectron2" / "val2017" / "1.png"
    assert read_image(str(made)).tolist() == [[0, 11, 19, 170, 255]]
    # Finished files stay unless they are asked for again.
    save(source / "1.png", np.array([[1]], np.uint8))
    main(["--splits", "val", *ONE_PROCESS])
    assert read_image(str(made)).shape == (1, 5)
    main(["--splits", "val", "--force", *ONE_PROCESS])
    assert read_image(str(made)).tolist() == [[1]]
    assert not list(made.parent.glob("*.tmp"))


def test_coco_stuff_of_other_numbers(script: Script, root: Path) -> None:
    # 11 is category 12, which COCO does not have: these labels were converted already.
    save(root / "coco" / "stuffthingmaps" / "val2017" / "1.png", np.array([[0, 11]], np.uint8))
    with pytest.raises(
        ValueError, match=r"val2017/1.png: label 11 \(1 pixel\) of none of the 171 classes; expected the files as"
    ):
        script("prepare_coco_stuff").main(["--splits", "val", *ONE_PROCESS])


def write_voc(base: Path) -> None:
    for stem, row in (("2007_1", [0, 1, 20, 255]), ("2007_2", [16, 0, 15, 2])):
        image = Image.fromarray(np.array([row], np.uint8), mode="P")
        image.putpalette([value % 256 for value in range(768)])
        (base / "SegmentationClassAug").mkdir(parents=True, exist_ok=True)
        image.save(base / "SegmentationClassAug" / f"{stem}.png")
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2007_2\n")


@pytest.mark.parametrize("folder", ["VOC2012", "VOCdevkit/VOC2012"])
@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_voc(script: Script, root: Path, folder: str) -> None:
    base = root / folder
    write_voc(base)
    script("prepare_voc").main(ONE_PROCESS)
    made = base / "annotations_ovs"
    assert read_image(str(made / "train" / "2007_1.png")).tolist() == [[255, 0, 19, 255]]
    assert read_image(str(made / "val" / "2007_2.png")).tolist() == [[15, 255, 14, 1]]
    assert len(list(made.rglob("*.png"))) == 2
    with_background = base / "annotations_ovs_background"
    assert read_image(str(with_background / "val" / "2007_2.png")).tolist() == [[15, 20, 14, 1]]
    assert len(list(with_background.rglob("*.png"))) == 2
    (base / "ImageSets" / "Segmentation" / "train_aug.txt").write_text(
        "/JPEGImages/2007_2.jpg /SegmentationClassAug/x\n"
    )
    assert script("prepare_voc").image_names(str(base), "train") == ["2007_2"]


def write_context(root: Path, **content: np.ndarray) -> None:
    base = root / "VOC2010"
    (base / "trainval").mkdir(parents=True)
    (base / "ImageSets" / "Main").mkdir(parents=True)
    (base / "ImageSets" / "Main" / "val.txt").write_text("2008_1\n")
    scipy.io.savemat(base / "trainval" / "2008_1.mat", content)


def test_pascal_context(script: Script, root: Path) -> None:
    ids = {row["name"]: row["id"] for row in class_table("pascal_context_459")}
    names = ["accordion", "aeroplane", "table", "wool", "wood"]
    write_context(root, LabelMap=np.array([[0, *(ids[name] for name in names)]], np.uint16))
    script("prepare_pascal_context").main(ONE_PROCESS)
    labels = root / "VOC2010" / "annotations_detectron2_ovs"
    small = class_names("pascal_context_59")
    expected = [255, 255, small.index("aeroplane"), small.index("diningtable"), 255, small.index("wood")]
    assert read_image(str(labels / "pc59_val" / "2008_1.png")).tolist() == [expected]
    full = read_image(str(labels / "pc459_val" / "2008_1.tif"))
    assert full.dtype == np.uint16
    assert full.tolist() == [[65535, *(class_names("pascal_context_459").index(name) for name in names)]]


def test_pascal_context_errors(script: Script, root: Path) -> None:
    main = script("prepare_pascal_context").main
    with pytest.raises(FileNotFoundError, match=r"VOC2010/trainval does not exist"):
        main(ONE_PROCESS)
    write_context(root, other=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"2008_1.mat has no LabelMap"):
        main(ONE_PROCESS)
    path = root / "VOC2010" / "trainval" / "2008_1.mat"
    path.write_bytes(b"no such thing" * 20)
    with pytest.raises(ValueError, match=r"2008_1.mat cannot be read"):
        main(ONE_PROCESS)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"2008_1.mat does not exist"):
        main(ONE_PROCESS)


def test_ade20k_full(script: Script, root: Path) -> None:
    base = root / "ADE20K_2021_17_01"
    folder = base / "images" / "ADE" / "validation" / "urban" / "street"
    wall, last = class_table("ade20k_847")[0]["id"], class_table("ade20k_847")[846]["id"]
    segments = np.zeros((520, 600, 3), np.uint8)
    for column, number in ((slice(0, 300), wall), (slice(300, 450), last)):
        segments[:, column, 0], segments[:, column, 1] = number // 256 * 10 + 3, number % 256
    segments[..., 2] = 77  # instances: not read
    save(folder / "ADE_val_1_seg.png", segments)
    save(folder / "ADE_val_1.jpg", np.full((520, 600, 3), 90, np.uint8))
    script("prepare_ade20k_full").main(["--splits", "validation", *ONE_PROCESS])
    labels = read_image(str(base / "annotations_detectron2" / "validation" / "ADE_val_1.tif"))
    assert labels.dtype == np.uint16 and labels.shape == (512, 591)  # the shorter side is 512
    assert (np.unique(labels[:, :290]), np.unique(labels[:, 300:440]), np.unique(labels[:, 450:])) == (0, 846, 65535)
    image = read_image(str(base / "images_detectron2" / "validation" / "ADE_val_1.jpg"), "RGB")
    assert image.shape == (512, 591, 3) and abs(int(image.mean()) - 90) < 3


def test_ade20k_full_errors(script: Script, root: Path) -> None:
    main = script("prepare_ade20k_full").main
    source = root / "ADE20K_2021_17_01" / "images" / "ADE" / "validation"
    with pytest.raises(FileNotFoundError, match=r"images/ADE/validation does not exist"):
        main(["--splits", "validation", *ONE_PROCESS])
    source.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"has no ADE_\*.jpg below it"):
        main(["--splits", "validation", *ONE_PROCESS])
    save(source / "ADE_val_1.jpg", np.zeros((8, 9, 3), np.uint8))
    with pytest.raises(FileNotFoundError, match=r"ADE_val_1_seg.png does not exist"):
        main(["--splits", "validation", *ONE_PROCESS])
    save(source / "ADE_val_1_seg.png", np.zeros((9, 8, 3), np.uint8))
    with pytest.raises(
        ValueError, match=r"ADE_val_1_seg.png is 9 x 8 \(height x width\), expected 8 x 9 as in its image"
    ):
        main(["--splits", "validation", *ONE_PROCESS])


@pytest.mark.parametrize("name", ["coco_stuff", "voc", "pascal_context", "ade20k_full"])
def test_help_teaches(script: Script, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script(f"prepare_{name}").main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "examples:" in text and "DETECTRON2_DATASETS" in text and f"python datasets/prepare_{name}.py" in text
