#!/usr/bin/env python
"""Convert ADE20K (SceneParse150 with its instance labels) to semantic, instance and panoptic annotations.

Expected below $DETECTRON2_DATASETS (default: datasets), from ADEChallengeData2016.zip and annotations_instance.tar:
  ADEChallengeData2016/images/{training,validation}/*.jpg
  ADEChallengeData2016/annotations/{training,validation}/*.png            classes 1..150, 0 unlabelled
  ADEChallengeData2016/annotations_instance/{training,validation}/*.png   R: thing 1..100, G: instance; not for semantic
Written beside them:
  annotations_detectron2/{training,validation}/*.png                      classes 0..149, 255 unlabelled
  ade20k_instance_{train,val}.json                                        COCO instances (RLE) of the 100 things
  ade20k_panoptic_{train,val}.json, ade20k_panoptic_{train,val}/*.png     COCO panoptic

An interrupted run can be continued: what is known of finished images is kept in ade20k_panoptic_{train,val}.partial
until the JSON files are written.

examples:
  python datasets/prepare_ade20k.py                       everything
  python datasets/prepare_ade20k.py --only semantic       without the instance labels
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from ovseg_d2.data.augmentation import encode_rgb_ids
from ovseg_d2.data.datasets import dataset_root
from ovseg_d2.data.datasets.class_tables import class_table
from ovseg_d2.data.datasets.coco_format import read_json
from ovseg_d2.data.datasets.conversion import (
    get_parser,
    renumber,
    require_folder,
    run_jobs,
    run_script,
    save_image,
    save_json,
    verify_files,
    verify_labels,
)
from ovseg_d2.data.image_io import check_size, read_image
from ovseg_d2.data.label_files import LabelFile

SPLITS = {"train": "training", "val": "validation"}
CATEGORIES = class_table("ade20k_150")
#: Class index of thing 1..100 of the instance labels: they are numbered in the order of the 150 classes.
THING_CLASSES = [category["id"] for category in CATEGORIES if category["isthing"]]


def get_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = get_parser(__doc__)
    parser.add_argument("--splits", nargs="+", choices=tuple(SPLITS), default=tuple(SPLITS))
    parser.add_argument("--only", choices=("semantic",), help="without instance and panoptic annotations")
    return parser.parse_args(argv)


def panoptic_segments(semantic: np.ndarray, instance: np.ndarray) -> tuple[np.ndarray, list[dict], list[np.ndarray]]:
    """Stuff regions with the things pasted over them.

    Args:
        semantic: (H, W) uint8 classes 0..149, 255 unlabelled.
        instance: (H, W, 3) uint8, thing 1..100 in R and number of the instance in G.

    Returns:
        segment ids (H, W) int32 (0: no segment), the segments, and the masks (H, W) bool of the things among them (at
        the end of the list).
    """
    ids = np.zeros(semantic.shape, np.int32)
    classes: list[int] = []
    for class_id in np.unique(semantic):
        if class_id < len(CATEGORIES) and not CATEGORIES[class_id]["isthing"]:
            classes.append(int(class_id))
            ids[semantic == class_id] = len(classes)
    num_stuff = len(classes)
    masks = []
    keys = instance[..., 0].astype(np.int32) << 8 | instance[..., 1]
    for key in np.unique(keys[instance[..., 0] > 0]):
        masks.append(keys == key)
        classes.append(THING_CLASSES[(int(key) >> 8) - 1])
        ids[masks[-1]] = len(classes)
    areas = np.bincount(ids.ravel(), minlength=len(classes) + 1)
    segments = [
        {
            "id": i + 1,
            "category_id": class_id,
            "iscrowd": 0,
            "area": int(areas[i + 1]),
            "bbox": mask_util.toBbox(mask_util.encode(np.asfortranarray(ids == i + 1, np.uint8))).tolist(),
        }
        for i, class_id in enumerate(classes)
        if i >= num_stuff or areas[i + 1]  # stuff may be covered wholly
    ]
    return ids, segments, masks


def convert_semantic(stem: str, *, base: str, folder: str, force: bool) -> None:
    """Write the semantic label image of one picture."""
    target = os.path.join(base, "annotations_detectron2", folder, stem + ".png")
    if force or not os.path.exists(target):
        path = os.path.join(base, "annotations", folder, stem + ".png")
        labels = read_image(path)
        if labels.ndim != 2:
            raise ValueError(f"{path} has shape {labels.shape}, expected one channel")
        save_image(target, renumber(labels, range(1, 151), ignore=[0], ignore_label=255, path=path))


def convert_panoptic(stem: str, *, base: str, split: str) -> None:
    """Write the panoptic label image of one picture, and its entries of the JSON files into the folder of unfinished
    work. These come last, so that they mark a finished picture."""
    entries = os.path.join(unfinished(base, split), stem + ".json")
    target = os.path.join(base, f"ade20k_panoptic_{split}", stem + ".png")
    if not (os.path.exists(entries) and os.path.exists(target)):
        ids, content = panoptic_entries(stem, base=base, split=split)
        save_image(target, encode_rgb_ids(ids))
        save_json(entries, content)


def unfinished(base: str, split: str) -> str:
    return os.path.join(base, f"ade20k_panoptic_{split}.partial")


def panoptic_entries(stem: str, *, base: str, split: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Segment ids (H, W) of one picture, and its entries of the JSON files."""
    folder = SPLITS[split]
    semantic = read_image(os.path.join(base, "annotations_detectron2", folder, stem + ".png"))
    path = os.path.join(base, "annotations_instance", folder, stem + ".png")
    instance = read_image(path)
    check_size(path, instance.shape[:2], semantic.shape, "the semantic labels")
    if instance.ndim != 3 or instance[..., 0].max() > len(THING_CLASSES):
        raise ValueError(f"{path}: expected an RGB image with things 0..{len(THING_CLASSES)} in the first channel")
    ids, segments, masks = panoptic_segments(semantic, instance)
    encoded = [mask_util.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
    things = segments[len(segments) - len(masks) :]
    return ids, {
        "image": {"id": stem, "file_name": stem + ".jpg", "height": ids.shape[0], "width": ids.shape[1]},
        "panoptic": {"image_id": stem, "file_name": stem + ".png", "segments_info": segments},
        "instances": [
            {
                "image_id": stem,
                "category_id": thing["category_id"],
                "iscrowd": 0,
                "area": int(mask_util.area(rle)),
                "bbox": mask_util.toBbox(rle).tolist(),
                "segmentation": {"size": list(ids.shape), "counts": rle["counts"].decode("ascii")},
            }
            for thing, rle in zip(things, encoded, strict=True)
        ],
        # Pixels of instances, and how many of them have the same class in the semantic labels.
        "agreement": [
            sum(int(mask.sum()) for mask in masks),
            sum(int((semantic[mask] == t["category_id"]).sum()) for t, mask in zip(things, masks, strict=True)),
        ],
    }


def write_annotations(base: str, split: str, results: list[dict[str, Any]]) -> None:
    pixels, same = np.sum([result["agreement"] for result in results], axis=0)
    if same < 0.5 * pixels:
        raise ValueError(
            f"{base}/annotations_instance: only {100 * same / pixels:.0f} % of the pixels of instances have the class "
            "of the semantic labels; expected things numbered 1..100 in the order of the 150 classes"
        )
    images = [result["image"] for result in results]
    instances = [instance for result in results for instance in result["instances"]]
    save_json(
        os.path.join(base, f"ade20k_instance_{split}.json"),
        {
            "images": images,
            "annotations": [{"id": i + 1, **instance} for i, instance in enumerate(instances)],
            "categories": [{"id": c["id"], "name": c["name"]} for c in CATEGORIES if c["isthing"]],
        },
    )
    save_json(
        os.path.join(base, f"ade20k_panoptic_{split}.json"),
        {"images": images, "annotations": [result["panoptic"] for result in results], "categories": CATEGORIES},
    )


def prepare_panoptic(base: str, split: str, stems: list[str], *, workers: int, force: bool) -> None:
    jsons = [os.path.join(base, f"ade20k_{kind}_{split}.json") for kind in ("instance", "panoptic")]
    output = os.path.join(base, f"ade20k_panoptic_{split}")
    os.makedirs(output, exist_ok=True)
    is_complete = all(map(os.path.isfile, jsons)) and {stem + ".png" for stem in stems} <= set(os.listdir(output))
    if force or not is_complete:
        write_panoptic(base, split, stems, workers=workers, force=force)
    labels = [
        LabelFile(
            path=os.path.join(output, annotation["file_name"]),
            image=os.path.join(base, "annotations", SPLITS[split], annotation["file_name"]),
            labels=(0, *(segment["id"] for segment in annotation["segments_info"])),
            ignore_label=None,
            panoptic=True,
        )
        for annotation in read_json(jsons[1])["annotations"]
    ]
    verify_files(output, labels, workers=workers)


def write_panoptic(base: str, split: str, stems: list[str], *, workers: int, force: bool) -> None:
    partial = unfinished(base, split)
    if force:
        shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial, exist_ok=True)
    job = functools.partial(convert_panoptic, base=base, split=split)
    run_jobs(job, stems, workers=workers, description=f"{split}, panoptic")
    results = []
    for stem in stems:
        with open(os.path.join(partial, stem + ".json"), encoding="utf-8") as file:
            results.append(json.load(file))
    write_annotations(base, split, results)
    shutil.rmtree(partial)


def main(argv: list[str] | None = None) -> int:
    args = get_arguments(argv)
    base = os.path.join(dataset_root(), "ADEChallengeData2016")
    only_semantic = args.only == "semantic"
    for split in args.splits:
        folder = SPLITS[split]
        for kind in ("images", "annotations") if only_semantic else ("images", "annotations", "annotations_instance"):
            require_folder(os.path.join(base, kind, folder))
        output = os.path.join(base, "annotations_detectron2", folder)
        os.makedirs(output, exist_ok=True)
        files = sorted(file for file in os.listdir(os.path.join(base, "annotations", folder)) if file.endswith(".png"))
        stems = [os.path.splitext(file)[0] for file in files]
        job = functools.partial(convert_semantic, base=base, folder=folder, force=args.force)
        run_jobs(job, stems, workers=args.workers, description=split)
        verify_labels(
            output,
            files,
            num_classes=len(CATEGORIES),
            ignore_label=255,
            workers=args.workers,
            image_root=os.path.join(base, "images", folder),
        )
        if not only_semantic:
            prepare_panoptic(base, split, stems, workers=args.workers, force=args.force)
    print(f"ADE20K is ready in {base}")
    return 0


if __name__ == "__main__":
    run_script(main)
