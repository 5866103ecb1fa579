"""``python -m ovseg_d2.data.check``, and conversions that are interrupted or go wrong."""

from __future__ import annotations

import errno
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from PIL import Image

from ovseg_d2.data.check.__main__ import main as check
from ovseg_d2.data.datasets import conversion
from ovseg_d2.data.image_io import read_image
from tests.data.coded_data import CodedData
from tests.data.test_prepare_scripts import write_ade

Script = Callable[[str], ModuleType]
ONE_PROCESS = ["--workers", "1"]


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def outside(coded: CodedData) -> None:
    for stem, label in (("picture0", 77), ("picture2", 200)):
        path = coded.root / "semantic" / f"{stem}.png"
        labels = np.array(Image.open(path))
        labels[0, :2] = label
        write(path, labels)


def other_size(coded: CodedData) -> None:
    write(coded.root / "semantic" / "picture1.png", np.zeros((45, 61), np.uint8))


def broken(coded: CodedData) -> None:
    (coded.root / "semantic" / "picture1.png").write_bytes(b"\x89PNG half a fi")


def unknown_segment(coded: CodedData) -> None:
    path = coded.root / "panoptic" / "picture1.png"
    ids = np.array(Image.open(path))
    ids[0, 0] = 9
    write(path, ids)


def half_prepared(coded: CodedData) -> None:
    (coded.root / "semantic" / "picture1.png").unlink()


def not_prepared(coded: CodedData) -> None:
    (coded.root / "semantic").rename(coded.root / "elsewhere")


def too_few(coded: CodedData) -> None:
    MetadataCatalog.get("coded_semantic").num_images = 4


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("semantic", outside, "labels 77, 200 (4 pixels) in 2 of 3 label files: picture0.png, picture2.png; expected "),
        (
            "semantic",
            other_size,
            "1 of 3 label files are not of their image's size: picture1.png (45 x 61, image 61 x",
        ),
        ("semantic", broken, "1 of 3 label files cannot be read: picture1.png: image "),
        ("semantic", not_prepared, "semantic does not exist (see datasets/README.md)"),
        ("semantic", too_few, "3 images, the public dataset has 4"),
        (
            "panoptic",
            unknown_segment,
            "label 592137 (1 pixel) in 1 of 6 label files: picture1.png; expected the ids",
        ),
        ("panoptic", half_prepared, "picture1.png does not exist, though "),
    ],
)
def test_report(
    coded: CodedData, capsys: pytest.CaptureFixture[str], kind: str, damage: Callable[[CodedData], None], message: str
) -> None:
    name = f"coded_{kind}"
    assert check([name, *ONE_PROCESS]) == 0 and "PROBLEM" not in capsys.readouterr().out
    damage(coded)
    assert check([name, *ONE_PROCESS]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if "PROBLEM" in line]
    assert any(message in line for line in problems), problems
    needs_no_decoding = damage in (half_prepared, not_prepared, too_few)
    assert check([name, "--quick", "--partial"]) == int(needs_no_decoding and damage is not too_few)


@pytest.mark.filterwarnings("ignore:'ovseg_d2.data.check.__main__' found in sys.modules")
def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["check", "voc_sem_seg_val", "voc_sem_seg_vol"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("ovseg_d2.data.check", run_name="__main__")
    assert stopped.value.code.startswith(
        "error: dataset 'voc_sem_seg_vol' is not registered; did you mean voc_sem_seg_"
    )
    assert capsys.readouterr().out == ""


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert check([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith(" cityscapes_fine_panoptic_val") for line in lines)
    assert any(line.split()[-1] == "openvocab_pascal21_sem_seg_val" for line in lines)


@pytest.mark.parametrize(
    ("name", "split"), [("coco", "vol"), ("coco_stuff", "test"), ("ade20k", "validation"), ("voc", "trainval")]
)
def test_wrong_split(script: Script, capsys: pytest.CaptureFixture[str], name: str, split: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        script(f"prepare_{name}").main(["--splits", split])
    assert stopped.value.code == 2
    assert f"invalid choice: '{split}' (choose from " in capsys.readouterr().err.replace(
        "choose from 't", "choose from t"
    )


def test_full_disk(script: Script, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the second file is written when the disk is full; the next run goes on from the first."""
    source = root / "coco" / "stuffthingmaps" / "val2017"
    for number in range(3):
        write(source / f"{number}.png", np.full((4, 5), number, np.uint8))
    made = root / "coco" / "stuffthingmaps_detectron2" / "val2017"
    save = Image.Image.save

    def save_until_full(image: Image.Image, path: str, **options: Any) -> None:
        if list(made.glob("*.png")):
            Path(path).write_bytes(b"\x89PNG half a fi")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(image, path, **options)

    main = script("prepare_coco_stuff").main
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save_until_full)
        with pytest.raises(OSError, match="No space left on device; finished files are whole, and the same.*1.png"):
            main(["--splits", "val", *ONE_PROCESS])
    assert [path.name for path in made.iterdir()] == ["0.png"]
    before = (made / "0.png").stat().st_mtime_ns
    main(["--splits", "val", *ONE_PROCESS])
    assert sorted(path.name for path in made.iterdir()) == ["0.png", "1.png", "2.png"]
    assert (made / "0.png").stat().st_mtime_ns == before


def test_files_that_other_scripts_left_half_written(script: Script, root: Path) -> None:
    write(root / "coco" / "stuffthingmaps" / "val2017" / "1.png", np.zeros((4, 5), np.uint8))
    made = root / "coco" / "stuffthingmaps_detectron2" / "val2017" / "1.png"
    main = script("prepare_coco_stuff").main
    for content, message in (
        (np.full((4, 5), 171, np.uint8), r"label 171 \(20 pixels\) in 1 of 1"),
        (None, "cannot be"),
    ):
        write(made, content) if content is not None else made.write_bytes(b"\x89PNG half a fi")
        with pytest.raises(ValueError, match=f"{message}.*--force writes them again"):
            main(["--splits", "val", *ONE_PROCESS])
    main(["--splits", "val", "--force", *ONE_PROCESS])
    assert read_image(str(made)).tolist() == np.zeros((4, 5)).tolist()


def test_missing_label_files(root: Path) -> None:
    with pytest.raises(ValueError, match=r"2 of 2 label files are missing: a.png, b.png"):
        conversion.verify_labels(str(root), ["b.png", "a.png"], num_classes=2, ignore_label=255, workers=1)


def test_ade20k_goes_on(script: Script, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the first picture: there is no annotation file, and the first picture is not made again."""
    base = write_ade(root, (1, 100))
    for folder, suffix in (("images", "jpg"), ("annotations", "png"), ("annotations_instance", "png")):
        first = base / folder / "validation" / f"ADE_val_00000001.{suffix}"
        (first.parent / f"ADE_val_00000002.{suffix}").write_bytes(first.read_bytes())
    module = script("prepare_ade20k")
    made: list[str] = []

    def killed_at_the_second(stem: str, **options: Any) -> Any:
        made.append(stem)
        if made == ["ADE_val_00000001", "ADE_val_00000002"]:
            raise KeyboardInterrupt
        return entries(stem, **options)

    entries = module.panoptic_entries
    monkeypatch.setattr(module, "panoptic_entries", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        module.main(["--splits", "val", *ONE_PROCESS])
    assert not (base / "ade20k_panoptic_val.json").exists() and not (base / "ade20k_instance_val.json").exists()
    module.main(["--splits", "val", *ONE_PROCESS])
    assert made == ["ADE_val_00000001", "ADE_val_00000002", "ADE_val_00000002"]
    assert not (base / "ade20k_panoptic_val.partial").exists()
    content = json.loads((base / "ade20k_panoptic_val.json").read_text())
    assert [a["image_id"] for a in content["annotations"]] == ["ADE_val_00000001", "ADE_val_00000002"]
    module.main(["--splits", "val", *ONE_PROCESS])
    assert len(made) == 3
