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

examples:
  python datasets/prepare_ade20k.py                       everything
  python datasets/prepare_ade20k.py --only semantic       without the instance labels
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image
from tqdm import tqdm

from ovseg_d2.data.augmentation import encode_rgb_ids
from ovseg_d2.data.datasets import dataset_root
from ovseg_d2.data.datasets.class_tables import class_table
from ovseg_d2.data.image_io import check_size, read_image

SPLITS = {"train": "training", "val": "validation"}
CATEGORIES = class_table("ade20k_150")
#: Class index of thing 1..100 of the instance labels: they are numbered in the order of the 150 classes.
THING_CLASSES = [category["id"] for category in CATEGORIES if category["isthing"]]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", nargs="+", choices=tuple(SPLITS), default=tuple(SPLITS))
    parser.add_argument("--only", choices=("semantic",), help="without instance and panoptic annotations")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="processes (%(default)s)")
    return parser


def semantic_labels(labels: np.ndarray) -> np.ndarray:
    """Classes 1..150 with 0 for unlabelled (H, W) uint8 -> 0..149 with 255 for unlabelled."""
    return labels - np.uint8(1)  # 0 wraps around to 255


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


def convert(stem: str, *, base: str, split: str, only_semantic: bool) -> dict[str, Any]:
    """Write the label files of one image; returns its entries of the JSON files."""
    folder = SPLITS[split]
    labels = read_image(os.path.join(base, "annotations", folder, stem + ".png"))
    semantic = semantic_labels(labels)
    Image.fromarray(semantic).save(os.path.join(base, "annotations_detectron2", folder, stem + ".png"))
    if only_semantic:
        return {}

    path = os.path.join(base, "annotations_instance", folder, stem + ".png")
    instance = read_image(path)
    check_size(path, instance.shape[:2], semantic.shape, "the semantic labels")
    if instance.ndim != 3 or instance[..., 0].max() > len(THING_CLASSES):
        raise ValueError(f"{path}: expected an RGB image with things 0..{len(THING_CLASSES)} in the first channel")
    ids, segments, masks = panoptic_segments(semantic, instance)
    Image.fromarray(encode_rgb_ids(ids)).save(os.path.join(base, f"ade20k_panoptic_{split}", stem + ".png"))
    encoded = [mask_util.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
    things = segments[len(segments) - len(masks) :]
    return {
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


def write_json(path: str, content: dict) -> None:
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.replace(path + ".tmp", path)


def write_annotations(base: str, split: str, results: list[dict[str, Any]]) -> None:
    pixels, same = np.sum([result["agreement"] for result in results], axis=0)
    if same < 0.5 * pixels:
        raise ValueError(
            f"{base}/annotations_instance: only {100 * same / pixels:.0f} % of the pixels of instances have the class "
            "of the semantic labels; expected things numbered 1..100 in the order of the 150 classes"
        )
    images = [result["image"] for result in results]
    instances = [instance for result in results for instance in result["instances"]]
    write_json(
        os.path.join(base, f"ade20k_instance_{split}.json"),
        {
            "images": images,
            "annotations": [{"id": i + 1, **instance} for i, instance in enumerate(instances)],
            "categories": [{"id": c["id"], "name": c["name"]} for c in CATEGORIES if c["isthing"]],
        },
    )
    write_json(
        os.path.join(base, f"ade20k_panoptic_{split}.json"),
        {"images": images, "annotations": [result["panoptic"] for result in results], "categories": CATEGORIES},
    )


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    base = os.path.join(dataset_root(), "ADEChallengeData2016")
    only_semantic = args.only == "semantic"
    for split in args.splits:
        folder = SPLITS[split]
        for kind in ("images", "annotations") if only_semantic else ("images", "annotations", "annotations_instance"):
            if not os.path.isdir(os.path.join(base, kind, folder)):
                raise FileNotFoundError(f"folder {os.path.join(base, kind, folder)} does not exist (see --help)")
        os.makedirs(os.path.join(base, "annotations_detectron2", folder), exist_ok=True)
        if not only_semantic:
            os.makedirs(os.path.join(base, f"ade20k_panoptic_{split}"), exist_ok=True)
        files = sorted(os.listdir(os.path.join(base, "annotations", folder)))
        stems = [os.path.splitext(file)[0] for file in files if file.endswith(".png")]
        job = functools.partial(convert, base=base, split=split, only_semantic=only_semantic)
        with multiprocessing.Pool(args.workers) as pool:
            results = list(tqdm(pool.imap(job, stems, chunksize=8), total=len(stems), desc=split, unit="image"))
        if not only_semantic:
            write_annotations(base, split, results)
    print(f"ADE20K is ready in {base}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
