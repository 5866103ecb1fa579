#!/usr/bin/env python
"""Renumber the label maps of COCO-Stuff (171 classes): of all 164k images of COCO 2017, or of the older set of 10k.

Expected below $DETECTRON2_DATASETS (default: datasets), from stuffthingmaps_trainval2017.zip
(https://github.com/nightrome/cocostuff) and the 2017 images of https://cocodataset.org:
  coco/{train2017,val2017}/*.jpg
  coco/stuffthingmaps/{train2017,val2017}/*.png                category id - 1, 255 unlabelled
Written:
  coco/stuffthingmaps_detectron2/{train2017,val2017}/*.png     classes 0..170, 255 unlabelled

For the 10k, from cocostuff-10k-v1.1.zip (https://github.com/nightrome/cocostuff10k):
  coco/coco_stuff_10k/images/*.jpg
  coco/coco_stuff_10k/annotations/*.mat                        S: category id, 0 unlabelled
  coco/coco_stuff_10k/imageLists/{train,test}.txt
Written:
  coco/coco_stuff_10k/images_detectron2/{train,test}/*.jpg        links where links are possible
  coco/coco_stuff_10k/annotations_detectron2/{train,test}/*.png   classes 0..170, 255 unlabelled

The zero-shot sets (156 seen, 15 unseen) are read from the same files; nothing else is needed. Folders of ZSSeg's script
({train2017,val2017}_{base,novel}) are used if you have them. Finished files are kept, so an interrupted run can be
continued.

examples:
  python datasets/prepare_coco_stuff.py                        both splits
  python datasets/prepare_coco_stuff.py --splits val --workers 8
  python datasets/prepare_coco_stuff.py --version 10k          the 10k images
"""

from __future__ import annotations

import functools
import os
import shutil
from argparse import Namespace

from ovseg_d2.data.datasets import dataset_root
from ovseg_d2.data.datasets.class_tables import class_table
from ovseg_d2.data.datasets.conversion import (
    get_parser,
    read_mat,
    read_names,
    renumber,
    require_folder,
    run_jobs,
    run_script,
    save_image,
    verify_labels,
    whole_file,
)
from ovseg_d2.data.image_io import read_image

CATEGORY_IDS = [row["id"] for row in class_table("coco_stuff_171")]
#: Values of the 171 classes in the label maps of the 164k images.
LABELS = [category_id - 1 for category_id in CATEGORY_IDS]


def convert(file: str, *, source: str, output: str, force: bool) -> None:
    """Write the label image of one picture."""
    target = os.path.join(output, file)
    if force or not os.path.exists(target):
        path = os.path.join(source, file)
        labels = read_image(path)
        if labels.ndim != 2:
            raise ValueError(f"{path} has shape {labels.shape}, expected one channel")
        save_image(target, renumber(labels, LABELS, ignore=[255], ignore_label=255, path=path))


def convert_10k(stem: str, *, base: str, split: str, force: bool) -> None:
    """Put the image of one picture of the 10k into its split, and write the label image."""
    image = os.path.join(base, "images_detectron2", split, stem + ".jpg")
    if force or not os.path.exists(image):
        place_image(os.path.join(base, "images", stem + ".jpg"), image)
    target = os.path.join(base, "annotations_detectron2", split, stem + ".png")
    if force or not os.path.exists(target):
        path = os.path.join(base, "annotations", stem + ".mat")
        labels = read_mat(path, "S")
        save_image(target, renumber(labels, CATEGORY_IDS, ignore=[0], ignore_label=255, path=path))


def place_image(path: str, target: str) -> None:
    """A hard link to the image, or a copy where links are not possible."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist (see --help)")
    with whole_file(target) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


def prepare(args: Namespace, split: str) -> None:
    """Of the 164k images."""
    coco = os.path.join(dataset_root(), "coco")
    source = require_folder(os.path.join(coco, "stuffthingmaps", f"{split}2017"))
    output = os.path.join(coco, "stuffthingmaps_detectron2", f"{split}2017")
    os.makedirs(output, exist_ok=True)
    files = sorted(file for file in os.listdir(source) if file.endswith(".png"))
    job = functools.partial(convert, source=source, output=output, force=args.force)
    run_jobs(job, files, workers=args.workers, description=split)
    verify(args, output, files, images=os.path.join(coco, f"{split}2017"))


def prepare_10k(args: Namespace, split: str) -> None:
    base = require_folder(os.path.join(dataset_root(), "coco", "coco_stuff_10k"))
    part = {"train": "train", "val": "test"}[split]
    names = read_names(os.path.join(base, "imageLists", f"{part}.txt"))
    images, output = (os.path.join(base, f"{kind}_detectron2", part) for kind in ("images", "annotations"))
    for folder in (images, output):
        os.makedirs(folder, exist_ok=True)
    job = functools.partial(convert_10k, base=base, split=part, force=args.force)
    run_jobs(job, names, workers=args.workers, description=f"10k {part}")
    verify(args, output, [name + ".png" for name in names], images=images)


def verify(args: Namespace, output: str, files: list[str], *, images: str) -> None:
    verify_labels(output, files, num_classes=171, ignore_label=255, workers=args.workers, image_root=images)
    print(f"{len(files)} label images in {output}")


def main(argv: list[str] | None = None) -> int:
    parser = get_parser(__doc__)
    parser.add_argument("--version", choices=("164k", "10k"), default="164k", help="which images (%(default)s)")
    parser.add_argument("--splits", nargs="+", choices=("train", "val"), default=("train", "val"))
    args = parser.parse_args(argv)
    for split in args.splits:
        (prepare if args.version == "164k" else prepare_10k)(args, split)
    return 0


if __name__ == "__main__":
    run_script(main)
