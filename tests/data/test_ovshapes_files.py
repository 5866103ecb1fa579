"""OVShapes on disk: its files agree with each other, whoever wrote them, and an interrupted run is done again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import MetadataCatalog
from PIL import Image

from ovseg_d2.data import OVSegDatasetMapper, build_train_loader, check_dataset
from ovseg_d2.data.check import load_dataset_dicts
from ovseg_d2.data.datasets import dataset_root, register_ovshapes
from ovseg_d2.data.datasets.ovshapes import CLASS_NAMES, SEEN_CLASS_IDS, is_seen
from ovseg_d2.data.datasets.ovshapes_writer import WorldSettings, existing_settings, scene, write_world
from tests.data.coded_data import data_cfg, forget

SETTINGS = WorldSettings(train=6, val=3, min_size=48, max_size=64)
NAMES = [f"ovshapes_{view}{kind}" for view in ("train", "val", "train_seen") for kind in ("", "_instance", "_sem_seg")]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(str(root / "ovshapes"), SETTINGS)
    return root


@pytest.fixture
def registered(world: Path) -> Iterator[Path]:
    """OVShapes registered below ``world`` instead of the default folder, for one test."""
    for name in NAMES:
        forget(name)
    register_ovshapes(str(world))
    yield world / "ovshapes"
    for name in NAMES:
        forget(name)
    register_ovshapes(dataset_root())


def test_number_of_workers_does_not_matter(world: Path, tmp_path: Path) -> None:
    write_world(str(tmp_path / "parallel"), SETTINGS, workers=3)
    assert files(world / "ovshapes") == files(tmp_path / "parallel")


def test_a_larger_world_begins_with_the_smaller_one(world: Path) -> None:
    larger = WorldSettings(train=99, val=99, min_size=48, max_size=64)
    np.testing.assert_array_equal(scene(larger, "train", 5).image, scene(SETTINGS, "train", 5).image)
    assert (scene(SETTINGS, "train", 0).image.shape != scene(SETTINGS, "val", 0).image.shape) or (
        scene(SETTINGS, "train", 0).image != scene(SETTINGS, "val", 0).image
    ).any()


@pytest.mark.parametrize("view", ["train", "val", "train_seen"])
def test_files_agree(world: Path, view: str) -> None:
    folder = world / "ovshapes"
    panoptic = json.loads((folder / "annotations" / f"panoptic_{view}.json").read_text())
    instances = json.loads((folder / "annotations" / f"instances_{view}.json").read_text())
    contiguous = {c["id"]: i for i, c in enumerate(panoptic["categories"])}
    names = {c["id"]: c["name"] for c in panoptic["categories"]}
    seen_only = view.endswith("_seen")
    assert len(contiguous) == (54 if seen_only else 72)
    assert [c["id"] for c in instances["categories"]] == [c["id"] for c in panoptic["categories"] if c["isthing"]]
    assert all(names[i] == CLASS_NAMES[i - 1] for i in names)
    for image, annotation in zip(panoptic["images"], panoptic["annotations"], strict=True):
        stem = f"{image['id']:06d}"
        picture = np.asarray(Image.open(folder / view.removesuffix("_seen") / f"{stem}.jpg"))
        assert picture.shape == (image["height"], image["width"], 3)
        rgb = np.asarray(Image.open(folder / f"panoptic_{view}" / f"{stem}.png")).astype(int)
        ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        semantic = np.asarray(Image.open(folder / f"semantic_{view}" / f"{stem}.png"))
        segments = annotation["segments_info"]
        assert set(np.unique(ids)) - {0} == {s["id"] for s in segments}
        assert (semantic[ids == 0] == 255).all()
        objects = [o for o in instances["annotations"] if o["image_id"] == image["id"]]
        for segment in segments:
            mask = ids == segment["id"]
            assert (semantic[mask] == contiguous[segment["category_id"]]).all()
            assert mask.sum() == segment["area"]
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            assert segment["bbox"] == box
            if segment["category_id"] <= 64:
                (match,) = [o for o in objects if (mask_util.decode(o["segmentation"]) == mask).all()]
                assert match["category_id"] == segment["category_id"] and match["area"] == segment["area"]
        assert len(objects) == sum(s["category_id"] <= 64 for s in segments)
        # What is missing from the seen view is exactly what is unseen.
        expected = scene(SETTINGS, view.removesuffix("_seen"), image["id"] - 1).class_ids
        kept = [c for c in expected if not seen_only or is_seen(c)]
        assert [s["category_id"] - 1 for s in segments] == kept
    ids_of_instances = [o["id"] for o in instances["annotations"]]
    assert len(set(ids_of_instances)) == len(ids_of_instances)


def test_interrupted_generation_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "ovshapes"

    def stop_in_the_middle(results, total, label):
        for index, result in enumerate(results):
            if index == 2:
                raise KeyboardInterrupt
            yield result

    with pytest.raises(KeyboardInterrupt):
        write_world(str(folder), SETTINGS, progress=stop_in_the_middle)
    assert not folder.exists() and existing_settings(str(folder)) is None
    write_world(str(folder), SETTINGS)
    assert existing_settings(str(folder)) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["ovshapes"]


def test_script(
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    main = script("prepare_ovshapes").main
    small = ["--train", "2", "--val", "1", "--min-size", "40", "--max-size", "44", "--workers", "1"]
    assert main([*small, "--preview", str(tmp_path / "sheet.png")]) == 0
    assert Image.open(tmp_path / "sheet.png").size[0] > 4 * 44 and not (tmp_path / "ovshapes").exists()
    assert main(small) == 0
    before = (tmp_path / "ovshapes" / "train" / "000001.jpg").stat().st_mtime_ns
    assert main(small) == 0 and "is complete" in capsys.readouterr().out
    assert (tmp_path / "ovshapes" / "train" / "000001.jpg").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"other settings .*--force"):
        main([*small, "--seed", "1"])
    assert main([*small, "--seed", "1", "--force"]) == 0
    assert existing_settings(str(tmp_path / "ovshapes"))["seed"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": 0}, "0 train and 200 val, expected at least 1"),
        ({"min_size": 90, "max_size": 80}, "image size 90..80: expected 32 <= min <= max"),
        ({"seed": -1}, "seed -1: expected 0 or more"),
    ],
)
def test_bad_settings(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorldSettings(**settings)


def test_a_world_that_was_not_generated(registered: Path) -> None:
    (registered / "val").rename(registered / "elsewhere")
    try:
        with pytest.raises(
            FileNotFoundError, match=r"ovshapes/val does not exist \(python datasets/prepare_ovshapes.py"
        ):
            check_dataset(data_cfg("ovshapes_val", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 72), "ovshapes_val")
    finally:
        (registered / "elsewhere").rename(registered / "val")


@pytest.mark.parametrize("kind", ["panoptic", "instance", "semantic"])
@pytest.mark.parametrize("view", ["train", "train_seen"])
def test_every_view_goes_through_check_mapper_and_loader(registered: Path, view: str, kind: str) -> None:
    name = f"ovshapes_{view}" + {"panoptic": "", "instance": "_instance", "semantic": "_sem_seg"}[kind]
    metadata = MetadataCatalog.get(name)
    num_classes = len(metadata.class_is_seen)
    num_seen = 48 if kind == "instance" else 54
    assert num_classes == (num_seen if view == "train_seen" else 64 if kind == "instance" else 72)
    assert sum(metadata.class_is_seen) == num_seen
    cfg = data_cfg(name, "INPUT.TARGETS", kind, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", num_classes)
    check_dataset(cfg, name)
    record = next(iter(build_train_loader(cfg)))[0]
    classes = record["instances"].gt_classes
    assert len(classes) and int(classes.max()) < num_classes


def test_seen_view_is_the_full_view_without_the_unseen(registered: Path) -> None:
    full, seen = (
        [OVSegDatasetMapper(data_cfg(name), is_train=True)(r) for r in load_dataset_dicts(name, filter_empty=False)]
        for name in ("ovshapes_train", "ovshapes_train_seen")
    )
    dropped = 0
    for a, b in zip(full, seen, strict=True):
        assert torch.equal(a["image"], b["image"])
        expected = torch.full_like(a["sem_seg"], 255)
        for contiguous, class_id in enumerate(SEEN_CLASS_IDS):
            expected[a["sem_seg"] == class_id] = contiguous
        assert torch.equal(b["sem_seg"], expected)
        dropped += int((expected == 255).sum())
        kept = [i for i, c in enumerate(a["instances"].gt_classes.tolist()) if is_seen(c)]
        assert torch.equal(a["instances"].gt_masks.tensor[kept], b["instances"].gt_masks.tensor)
    assert dropped > 0
