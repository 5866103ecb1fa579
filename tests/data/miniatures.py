"""The public datasets with two pictures a split, in the layouts of their downloads, and what each picture shows."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import scipy.io
from PIL import Image

from ovseg_d2.data.augmentation import encode_rgb_ids
from ovseg_d2.data.datasets.class_tables import class_table
from ovseg_d2.data.datasets.ovshapes import CLASS_NAMES
from ovseg_d2.data.datasets.ovshapes_writer import WorldSettings, scene
from tests.evaluation.cityscapes_files import write_cityscapes

Array = np.ndarray
SCRIPTS = Path(__file__).resolve().parents[2] / "datasets"
HEIGHT, WIDTH = 24, 32
WORLD = WorldSettings(2, 2, 64, 72, 0)


@dataclass(frozen=True)
class Truth:
    """Segments of a picture (H, W), 0 where there is none, and the name of segment i + 1."""

    segments: Array
    names: tuple[str, ...]


def load_script(name: str) -> ModuleType:
    """Import a script of ``datasets/``."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Miniatures:
    """Writes all downloads below ``root``; ``truths`` has what a picture shows, by the stem of its file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.truths: dict[str, Truth] = {}
        for write in (self._coco, self._stuff_10k, self._ade, self._ade_full, self._voc, self._context):
            write()
        self._ovshapes()

    def write_cityscapes(self) -> None:
        """Apart, as it takes the official scripts."""
        from cityscapesscripts.helpers.labels import id2label

        for seed, split in enumerate(("train", "val")):
            write_cityscapes(self.root / "cityscapes", seed=seed, split=split)
            for path in (self.root / "cityscapes" / "gtFine" / split).rglob("*_instanceIds.png"):
                ids = np.asarray(Image.open(path)).astype(int)
                numbers = [i for i in np.unique(ids) if not id2label[_label(i)].ignoreInEval]
                names = tuple(id2label[_label(i)].name for i in numbers)
                # The same cities are in both splits, so their folder counts.
                stem = f"{split}/{path.name.replace('_gtFine_instanceIds.png', '_leftImg8bit')}"
                self.truths[stem] = Truth(sum((ids == n) * (i + 1) for i, n in enumerate(numbers)), names)

    def _pictures(self, key: str, names: Sequence[str]) -> dict[str, Truth]:
        """Two pictures of four columns, each with three of the names and one that both have; 3 rows are unlabelled."""
        truths = {}
        for index, order in enumerate(([0, 1, 2, 3], [3, 4, 0, 1])):
            columns = np.repeat(np.arange(1, 5), WIDTH // 4)
            segments = np.tile(columns, (HEIGHT, 1))
            segments[-3:] = 0
            truths[f"{key}_{index}"] = Truth(segments, tuple(names[i] for i in order))
        self.truths |= truths
        return truths

    def _coco(self) -> None:
        coco, rows = self.root / "coco", {row["name"]: row for row in class_table("coco_panoptic")}
        stuff_ids = {row["name"]: row["id"] for row in class_table("coco_stuff_171")}
        (coco / "annotations").mkdir(parents=True)
        for part in ("train2017", "val2017"):
            pictures = self._pictures(part, ("person", "cow", "road", "sea", "car"))
            images, panoptic, instances = [], [], []
            for image_id, (stem, truth) in enumerate(pictures.items()):
                save_photograph(coco / part / f"{stem}.jpg")
                save(coco / f"panoptic_{part}" / f"{stem}.png", encode_rgb_ids(truth.segments * 300))
                save(coco / "stuffthingmaps" / part / f"{stem}.png", painted(truth, lambda n: stuff_ids[n] - 1, 255))
                images.append({"id": image_id, "file_name": f"{stem}.jpg", "height": HEIGHT, "width": WIDTH})
                entries = [annotation(truth.segments == i + 1, rows[name]) for i, name in enumerate(truth.names)]
                segments = [{**e, "id": 300 * (i + 1)} for i, e in enumerate(entries)]
                panoptic.append({"image_id": image_id, "file_name": f"{stem}.png", "segments_info": segments})
                instances += [{**e, "image_id": image_id} for e in entries if e["isthing"]]
            instances = [{**e, "id": i + 1} for i, e in enumerate(instances)]
            things = [row for row in rows.values() if row["isthing"]]
            for kind, entries, table in (("panoptic", panoptic, [*rows.values()]), ("instances", instances, things)):
                content = {"images": images, "annotations": entries, "categories": table}
                (coco / "annotations" / f"{kind}_{part}.json").write_text(json.dumps(content))

    def _stuff_10k(self) -> None:
        base, ids = self.root / "coco" / "coco_stuff_10k", {r["name"]: r["id"] for r in class_table("coco_stuff_171")}
        (base / "imageLists").mkdir(parents=True)
        (base / "annotations").mkdir()
        for part in ("train", "test"):
            pictures = self._pictures(f"COCO_{part}", ("person", "clouds", "wood", "sea", "hair drier"))
            for stem, truth in pictures.items():
                save_photograph(base / "images" / f"{stem}.jpg")
                labels = painted(truth, ids.__getitem__, 0)
                scipy.io.savemat(base / "annotations" / f"{stem}.mat", {"S": labels})
            (base / "imageLists" / f"{part}.txt").write_text("\n".join(pictures))

    def _ade(self) -> None:
        base, rows = self.root / "ADEChallengeData2016", {row["name"]: row for row in class_table("ade20k_150")}
        things = [name for name, row in rows.items() if row["isthing"]]
        for part in ("training", "validation"):
            pictures = self._pictures(f"ADE_{part}", ("wall", "bed", "grass", "flag", "traffic light"))
            for stem, truth in pictures.items():
                save_photograph(base / "images" / part / f"{stem}.jpg")
                save(base / "annotations" / part / f"{stem}.png", painted(truth, lambda n: rows[n]["id"] + 1, 0))
                instance = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
                instance[..., 0] = painted(truth, lambda n: things.index(n) + 1 if n in things else 0, 0)
                instance[..., 1] = truth.segments
                save(base / "annotations_instance" / part / f"{stem}.png", instance)

    def _ade_full(self) -> None:
        table = class_table("ade20k_847")
        rare = next(row["name"] for row in table if row["image_count"] <= 10)
        names = (table[0]["name"], table[-1]["name"], rare, table[1]["name"], table[300]["name"])
        ids = {row["name"]: row["id"] for row in table}
        for part in ("training", "validation"):
            for stem, truth in self._pictures(f"ADE_full_{part}", names).items():
                base = self.root / "ADE20K_2021_17_01" / "images" / "ADE" / part / "urban" / "street"
                save_photograph(base / f"{stem}.jpg")
                numbers = painted(truth, ids.__getitem__, 0, np.int64)
                code = np.stack([numbers // 256 * 10, numbers % 256, truth.segments], axis=-1)
                save(base / f"{stem}_seg.png", code.astype(np.uint8))

    def _voc(self) -> None:
        base, ids = self.root / "VOCdevkit" / "VOC2012", {r["name"]: r["id"] for r in class_table("voc_20")}
        for part in ("train", "val"):
            names = ("aeroplane", "background", "tvmonitor", "pottedplant", "person")
            for stem, truth in self._pictures(f"2012_{part}", names).items():
                save_photograph(base / "JPEGImages" / f"{stem}.jpg")
                labels = painted(truth, lambda n: ids.get(n, 0), 255)
                save(base / "SegmentationClassAug" / f"{stem}.png", labels)
        (base / "ImageSets" / "Segmentation").mkdir(parents=True)
        (base / "ImageSets" / "Segmentation" / "val.txt").write_text("2012_val_0\n2012_val_1\n")

    def _context(self) -> None:
        base, ids = self.root / "VOC2010", {row["name"]: row["id"] for row in class_table("pascal_context_459")}
        for folder in ("trainval", "ImageSets/Main"):
            (base / folder).mkdir(parents=True)
        for part in ("train", "val"):
            pictures = self._pictures(f"2010_{part}", ("person", "aeroplane", "table", "accordion", "sky"))
            for stem, truth in pictures.items():
                save_photograph(base / "JPEGImages" / f"{stem}.jpg")
                labels = painted(truth, ids.__getitem__, 0, np.uint16)
                scipy.io.savemat(base / "trainval" / f"{stem}.mat", {"LabelMap": labels})
            (base / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(pictures))

    def _ovshapes(self) -> None:
        for split in ("train", "val"):
            for index in range(2):
                picture = scene(WORLD, split, index)
                names = tuple(CLASS_NAMES[c] for c in picture.class_ids)
                self.truths[f"{split}/{index + 1:06d}"] = Truth(picture.segment_ids, names)


def painted(truth: Truth, label_of: Callable[[str], int], unlabelled: int, dtype: Any = np.uint8) -> Array:
    """Labels (H, W) of the names."""
    return np.array([unlabelled, *map(label_of, truth.names)], dtype)[truth.segments]


def annotation(mask: Array, category: dict[str, Any]) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
    return {
        "category_id": category["id"],
        "isthing": category["isthing"],
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": mask_util.toBbox(rle).tolist(),
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")},
    }


def save(path: Path, pixels: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_photograph(path: Path) -> None:
    save(path, np.full((HEIGHT, WIDTH, 3), 90, np.uint8))


def _label(number: int) -> int:
    """Cityscapes's label of an instance's number."""
    return int(number) // 1000 if number >= 1000 else int(number)
