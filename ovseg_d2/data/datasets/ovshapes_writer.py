"""Writes OVShapes to disk in COCO's layout: images, panoptic and semantic PNGs, panoptic and instance JSON files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from ovseg_d2.data.datasets.conversion import map_jobs
from ovseg_d2.data.datasets.ovshapes import SEEN_CLASS_IDS, categories, is_thing
from ovseg_d2.data.datasets.ovshapes_scene import NUM_CLASSES, Scene, render_scene

#: Raised whenever the pictures that a seed gives change.
WORLD_VERSION = 1
MARKER = "complete.json"
_SPLITS = ("train", "val")
#: File name suffix of a view -> its class indices; only train has the view without the unseen classes.
_VIEWS = {"train": ("", "_seen"), "val": ("",)}
_CLASS_IDS = {"": tuple(range(NUM_CLASSES)), "_seen": SEEN_CLASS_IDS}
_IGNORE_LABEL = 255


@dataclass(frozen=True)
class WorldSettings:
    """What determines every pixel. Sides of images are drawn uniformly from ``min_size..max_size``."""

    train: int = 1000
    val: int = 200
    min_size: int = 128
    max_size: int = 192
    seed: int = 0
    version: int = WORLD_VERSION

    def __post_init__(self) -> None:
        if min(self.train, self.val) < 1:
            raise ValueError(f"number of images: {self.train} train and {self.val} val, expected at least 1 of each")
        if not 32 <= self.min_size <= self.max_size:
            raise ValueError(f"image size {self.min_size}..{self.max_size}: expected 32 <= min <= max")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: expected 0 or more")


def scene(settings: WorldSettings, split: str, index: int) -> Scene:
    """Picture ``index`` of a split; it has a random stream of its own, so order and number of workers do not matter."""
    rng = np.random.default_rng([settings.seed, _SPLITS.index(split), index])
    height, width = rng.integers(settings.min_size, settings.max_size + 1, 2)
    return render_scene(rng, int(height), int(width))


def existing_settings(folder: str) -> dict[str, Any] | None:
    """Settings of the finished world in ``folder``; None if there is none (an interrupted one leaves no marker)."""
    try:
        with open(os.path.join(folder, MARKER), encoding="utf-8") as file:
            return json.load(file)
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write_world(
    folder: str,
    settings: WorldSettings,
    *,
    workers: int = 1,
    progress: Callable[[Iterable, int, str], Iterable] = lambda items, total, label: items,
) -> None:
    """Write both splits to ``folder``, replacing what a former run left there.

    Everything is written beside ``folder`` and moved there at the end: the folder is absent or complete, never half.

    Args:
        folder: ``$DETECTRON2_DATASETS/ovshapes``.
        workers: number of processes.
        progress: wraps an iterable of results, given its length and a label (a progress bar).
    """
    partial_folder = folder.rstrip(os.sep) + ".partial"
    shutil.rmtree(partial_folder, ignore_errors=True)
    os.makedirs(os.path.join(partial_folder, "annotations"))
    for split in _SPLITS:
        os.makedirs(os.path.join(partial_folder, split))
        for view in _VIEWS[split]:
            for kind in ("panoptic", "semantic"):
                os.makedirs(os.path.join(partial_folder, f"{kind}_{split}{view}"))
        count = getattr(settings, split)
        write = partial(_write_picture, partial_folder, settings, split)
        results = progress(map_jobs(write, range(count), workers=workers), count, split)
        _write_annotations(partial_folder, split, list(results))
    with open(os.path.join(partial_folder, MARKER), "w", encoding="utf-8") as file:
        json.dump(asdict(settings), file)

    if os.path.isdir(folder):
        shutil.rmtree(folder)
    os.replace(partial_folder, folder)


def _write_picture(folder: str, settings: WorldSettings, split: str, index: int) -> dict[str, Any]:
    """Write the image and label files of one picture; returns its entries of the JSON files, by view."""
    picture = scene(settings, split, index)
    image_id = index + 1
    stem = f"{image_id:06d}"
    # JPEG, as photographs are: near-lossless without chroma subsampling and a third of the size of a PNG.
    Image.fromarray(picture.image).save(os.path.join(folder, split, f"{stem}.jpg"), quality=95, subsampling=0)

    height, width = picture.segment_ids.shape
    entries: dict[str, Any] = {"image": {"id": image_id, "file_name": f"{stem}.jpg", "height": height, "width": width}}
    segments = [_segment(picture.segment_ids == i + 1, i + 1, c) for i, c in enumerate(picture.class_ids)]
    for view in _VIEWS[split]:
        contiguous = {class_id: i for i, class_id in enumerate(_CLASS_IDS[view])}
        kept = [segment for segment in segments if segment["class_id"] in contiguous]
        # Look-up tables from segment id (0: unlabelled) to the values of the PNG files.
        segment_value = np.zeros(len(segments) + 1, np.uint8)
        semantic_value = np.full(len(segments) + 1, _IGNORE_LABEL, np.uint8)
        for segment in kept:
            segment_value[segment["id"]] = segment["id"]
            semantic_value[segment["id"]] = contiguous[segment["class_id"]]
        # COCO's panoptic PNG: id = R + 256 G + 65536 B; a picture has fewer than 256 segments.
        panoptic = np.zeros((height, width, 3), np.uint8)
        panoptic[..., 0] = segment_value[picture.segment_ids]
        Image.fromarray(panoptic).save(os.path.join(folder, f"panoptic_{split}{view}", f"{stem}.png"))
        semantic = semantic_value[picture.segment_ids]
        Image.fromarray(semantic).save(os.path.join(folder, f"semantic_{split}{view}", f"{stem}.png"))
        entries[view] = kept
    return entries


def _segment(mask: np.ndarray, segment_id: int, class_id: int) -> dict[str, Any]:
    encoded = mask_util.encode(np.asfortranarray(mask, np.uint8))
    return {
        "id": segment_id,
        "class_id": class_id,
        "area": int(mask.sum()),
        "bbox": [float(value) for value in mask_util.toBbox(encoded)],
        "rle": {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")},
    }


def _write_annotations(folder: str, split: str, pictures: list[dict[str, Any]]) -> None:
    images = [picture["image"] for picture in pictures]
    for view in _VIEWS[split]:
        table = categories(_CLASS_IDS[view])
        panoptic, instances = [], []
        for picture in pictures:
            image = picture["image"]
            common = [
                {
                    "id": segment["id"],
                    "category_id": segment["class_id"] + 1,
                    "iscrowd": 0,
                    "area": segment["area"],
                    "bbox": segment["bbox"],
                }
                for segment in picture[view]
            ]
            panoptic.append(
                {
                    "image_id": image["id"],
                    "file_name": os.path.splitext(image["file_name"])[0] + ".png",
                    "segments_info": common,
                }
            )
            instances += [
                {**fields, "image_id": image["id"], "segmentation": segment["rle"]}
                for fields, segment in zip(common, picture[view], strict=True)
                if is_thing(segment["class_id"])
            ]
        # Ids of instances are unique in the whole file.
        instances = [{**instance, "id": i + 1} for i, instance in enumerate(instances)]
        things = [category for category in table if category["isthing"]]
        for kind, entries, kind_table in (("panoptic", panoptic, table), ("instances", instances, things)):
            content = {
                "info": {"description": f"OVShapes {split}{view}", "version": str(WORLD_VERSION)},
                "images": images,
                "annotations": entries,
                "categories": kind_table,
            }
            with open(os.path.join(folder, "annotations", f"{kind}_{split}{view}.json"), "w", encoding="utf-8") as file:
                json.dump(content, file)
