#!/usr/bin/env python
"""Make images and label images of the full ADE20K (847 classes) from its 2021 release.

Expected below $DETECTRON2_DATASETS (default: datasets), from https://groups.csail.mit.edu/vision/datasets/ADE20K
(ADE20K_2021_17_01.zip, after registration):
  ADE20K_2021_17_01/images/ADE/{training,validation}/**/ADE_*.jpg      with ADE_*_seg.png beside each
Written, with the shorter side 512 where it is longer:
  ADE20K_2021_17_01/images_detectron2/{training,validation}/*.jpg
  ADE20K_2021_17_01/annotations_detectron2/{training,validation}/*.tif  classes 0..846 in 16 bit, 65535 the others

A class is coded in red and green of the label images (red // 10 * 256 + green), so that the release's pickled index is
not read. The zero-shot sets (572 seen, 275 unseen) are read from the same files. Finished files are kept.

examples:
  python datasets/prepare_ade20k_full.py                       both splits
  python datasets/prepare_ade20k_full.py --splits validation   for the evaluation alone
"""

from __future__ import annotations

import functools
import os

import cv2
import numpy as np

from ovseg_d2.data.datasets import dataset_root
from ovseg_d2.data.datasets.class_tables import class_table
from ovseg_d2.data.datasets.conversion import (
    get_parser,
    require_folder,
    run_jobs,
    run_script,
    save_image,
    verify_labels,
)
from ovseg_d2.data.image_io import check_size, read_image

SPLITS = ("training", "validation")
SHORTER_SIDE = 512
IGNORE_LABEL = 65535
#: Class of every number in the release; most of its 3,000 and more are none of the 847.
CLASSES = np.full(26 * 256, IGNORE_LABEL, np.uint16)
CLASSES[[row["id"] for row in class_table("ade20k_847")]] = np.arange(847)


def semantic_labels(segments: np.ndarray) -> np.ndarray:
    """Colour-coded classes (H, W, 3) uint8 -> (H, W) uint16, 0..846 or 65535."""
    return CLASSES[segments[..., 0].astype(np.int64) // 10 * 256 + segments[..., 1]]


def small_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) with the shorter side at most 512."""
    scale = min(1.0, SHORTER_SIDE / min(width, height))
    return round(width * scale), round(height * scale)


def convert(path: str, *, base: str, split: str, force: bool) -> None:
    """Write the image and the label image of one picture."""
    stem = os.path.splitext(os.path.basename(path))[0]
    small = os.path.join(base, "images_detectron2", split, stem + ".jpg")
    target = os.path.join(base, "annotations_detectron2", split, stem + ".tif")
    if not force and os.path.exists(small) and os.path.exists(target):
        return
    image = read_image(path, "RGB")
    label_path = path.removesuffix(".jpg") + "_seg.png"
    segments = read_image(label_path)
    check_size(label_path, segments.shape[:2], image.shape[:2], "its image")
    if segments.ndim != 3:
        raise ValueError(f"{label_path} has shape {segments.shape}, expected an RGB image")
    labels = semantic_labels(segments)
    size = small_size(image.shape[1], image.shape[0])
    if size != (image.shape[1], image.shape[0]):
        # OpenCV's, not Pillow's: published numbers are on images that were resized without smoothing.
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
    save_image(small, image)
    save_image(target, labels)


def main(argv: list[str] | None = None) -> int:
    parser = get_parser(__doc__)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    args = parser.parse_args(argv)
    base = os.path.join(dataset_root(), "ADE20K_2021_17_01")
    for split in args.splits:
        source = require_folder(os.path.join(base, "images", "ADE", split))
        for kind in ("images_detectron2", "annotations_detectron2"):
            os.makedirs(os.path.join(base, kind, split), exist_ok=True)
        paths = sorted(os.path.join(folder, file) for folder, _, files in os.walk(source) for file in files)
        paths = [path for path in paths if path.endswith(".jpg")]
        if not paths:
            raise FileNotFoundError(f"{source} has no ADE_*.jpg below it (see --help)")
        job = functools.partial(convert, base=base, split=split, force=args.force)
        run_jobs(job, paths, workers=args.workers, description=split)
        verify_labels(
            os.path.join(base, "annotations_detectron2", split),
            [os.path.splitext(os.path.basename(path))[0] + ".tif" for path in paths],
            num_classes=847,
            ignore_label=IGNORE_LABEL,
            workers=args.workers,
            image_root=os.path.join(base, "images_detectron2", split),
        )
        print(f"{len(paths)} images in {os.path.join(base, 'images_detectron2', split)}")
    return 0


if __name__ == "__main__":
    run_script(main)
