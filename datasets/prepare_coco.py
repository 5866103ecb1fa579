#!/usr/bin/env python
"""Make semantic label images from COCO-panoptic annotations; mIoU is evaluated on them (training does not need them).

Pixels get the contiguous class index (0..132 for COCO, in the order of the category ids), unlabelled pixels 255.
Crowd regions keep their class. Finished files are kept, so an interrupted run can be continued.

COCO 2017 below $DETECTRON2_DATASETS (default: datasets):
  coco/annotations/panoptic_{train,val}2017.json, coco/panoptic_{train,val}2017/*.png are read,
  coco/panoptic_semseg_{train,val}2017/*.png are written

examples:
  python datasets/prepare_coco.py                              both splits of COCO 2017
  python datasets/prepare_coco.py --splits val --workers 8
  python datasets/prepare_coco.py --panoptic-json my/panoptic.json --panoptic-root my/panoptic --output my/semantic
"""

from __future__ import annotations

import argparse
import functools
import os

import numpy as np

from ovseg_d2.data.datasets import dataset_root
from ovseg_d2.data.datasets.coco_format import metadata_from_categories, read_json
from ovseg_d2.data.datasets.conversion import get_parser, run_jobs, run_script, save_image, verify_labels
from ovseg_d2.data.image_io import read_image
from ovseg_d2.data.label_map import LabelMap

IGNORE_LABEL = 255


def get_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = get_parser(__doc__)
    parser.add_argument("--splits", nargs="+", choices=("train", "val"), default=("train", "val"), help="of COCO 2017")
    parser.add_argument("--panoptic-json", help="annotation file of other data in this format")
    parser.add_argument("--panoptic-root", help="its folder of PNG files")
    parser.add_argument("--output", help="folder for its label images")
    return parser.parse_args(argv)


def semantic_labels(panoptic: np.ndarray, segments: list[dict], contiguous_ids: dict[int, int]) -> np.ndarray:
    """Class indices (H, W) uint8 of a panoptic PNG (H, W, 3) and its ``segments_info``."""
    segments = [{**segment, "category_id": contiguous_ids[segment["category_id"]]} for segment in segments]
    return LabelMap.from_panoptic(panoptic, segments).sem_seg(IGNORE_LABEL).numpy().astype(np.uint8)


def label_file(annotation: dict) -> str:
    return os.path.splitext(annotation["file_name"])[0] + ".png"


def convert(annotation: dict, *, source: str, output: str, contiguous_ids: dict[int, int], force: bool) -> None:
    """Write the label image of one annotation."""
    path = os.path.join(output, label_file(annotation))
    if force or not os.path.exists(path):
        panoptic = read_image(os.path.join(source, annotation["file_name"]))
        save_image(path, semantic_labels(panoptic, annotation["segments_info"], contiguous_ids))


def convert_all(
    panoptic_json: str, panoptic_root: str, output: str, image_root: str | None, *, workers: int, force: bool
) -> None:
    """Write the label images of an annotation file; ``image_root``: of images whose sizes they must have."""
    content = read_json(panoptic_json)
    contiguous_ids = metadata_from_categories(content["categories"])["stuff_dataset_id_to_contiguous_id"]
    if len(contiguous_ids) > IGNORE_LABEL:
        raise ValueError(
            f"{panoptic_json} has {len(contiguous_ids)} categories; 8-bit labels hold {IGNORE_LABEL} at most"
        )
    if not os.path.isdir(panoptic_root):
        raise FileNotFoundError(f"folder {panoptic_root} does not exist")
    os.makedirs(output, exist_ok=True)
    job = functools.partial(convert, source=panoptic_root, output=output, contiguous_ids=contiguous_ids, force=force)
    annotations = content["annotations"]
    run_jobs(job, annotations, workers=workers, description=os.path.basename(output))
    files = [label_file(annotation) for annotation in annotations]
    verify_labels(
        output,
        files,
        num_classes=len(contiguous_ids),
        ignore_label=IGNORE_LABEL,
        workers=workers,
        image_root=image_root,
    )
    print(f"{len(annotations)} label images in {output}")


def main(argv: list[str] | None = None) -> int:
    args = get_arguments(argv)
    own = (args.panoptic_json, args.panoptic_root, args.output)
    if any(own):
        if not all(own):
            raise ValueError("--panoptic-json, --panoptic-root and --output belong together: give all three")
        jobs = [(*own, None)]
    else:
        coco = os.path.join(dataset_root(), "coco")
        jobs = [
            (
                os.path.join(coco, "annotations", f"panoptic_{split}2017.json"),
                os.path.join(coco, f"panoptic_{split}2017"),
                os.path.join(coco, f"panoptic_semseg_{split}2017"),
                os.path.join(coco, f"{split}2017"),
            )
            for split in args.splits
        ]
    for panoptic_json, panoptic_root, output, image_root in jobs:
        convert_all(panoptic_json, panoptic_root, output, image_root, workers=args.workers, force=args.force)
    return 0


if __name__ == "__main__":
    run_script(main)
