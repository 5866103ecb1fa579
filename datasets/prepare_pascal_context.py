#!/usr/bin/env python
"""Make label images of Pascal Context, with 59 and with 459 classes, from the label maps that its authors distribute.

Expected below $DETECTRON2_DATASETS (default: datasets), from VOCtrainval_03-May-2010.tar (Pascal VOC 2010) and
trainval.tar.gz (https://cs.stanford.edu/~roozbeh/pascal-context); VOCdevkit/VOC2010 does as well:
  VOC2010/JPEGImages/*.jpg
  VOC2010/ImageSets/Main/{train,val}.txt                       4,998 and 5,105 images
  VOC2010/trainval/*.mat                                       LabelMap: classes 1..459, 0 unlabelled
Written:
  VOC2010/annotations_detectron2_ovs/pc59_{train,val}/*.png    classes 0..58, 255 the other 400 classes and unlabelled
  VOC2010/annotations_detectron2_ovs/pc459_{train,val}/*.tif   classes 0..458 in 16 bit, 65535 unlabelled

The 59 classes are picked out of the 459 (diningtable is "table" there), which needs no Detail API. Finished files are
kept, so an interrupted run can be continued.

examples:
  python datasets/prepare_pascal_context.py                    validation, which is all that open-vocabulary tests need
  python datasets/prepare_pascal_context.py --splits train val
"""

from __future__ import annotations

import functools
import os

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
)

LABELS_59 = [row["id"] for row in class_table("pascal_context_59")]
LABELS_459 = [row["id"] for row in class_table("pascal_context_459")]
OTHERS = sorted({0, *LABELS_459} - set(LABELS_59))


def convert(stem: str, *, source: str, outputs: tuple[str, str], force: bool) -> None:
    """Write both label images of one picture."""
    targets = os.path.join(outputs[0], stem + ".png"), os.path.join(outputs[1], stem + ".tif")
    if force or not all(map(os.path.exists, targets)):
        path = os.path.join(source, stem + ".mat")
        labels = read_mat(path, "LabelMap")
        save_image(targets[0], renumber(labels, LABELS_59, ignore=OTHERS, ignore_label=255, path=path))
        save_image(targets[1], renumber(labels, LABELS_459, ignore=[0], ignore_label=65535, path=path))


def main(argv: list[str] | None = None) -> int:
    parser = get_parser(__doc__)
    parser.add_argument("--splits", nargs="+", choices=("train", "val"), default=("val",))
    args = parser.parse_args(argv)
    devkit = os.path.join(dataset_root(), "VOCdevkit", "VOC2010")
    base = devkit if os.path.isdir(devkit) else os.path.join(dataset_root(), "VOC2010")
    source = require_folder(os.path.join(base, "trainval"))
    for split in args.splits:
        names = read_names(os.path.join(base, "ImageSets", "Main", f"{split}.txt"))
        labels = os.path.join(base, "annotations_detectron2_ovs")
        outputs = os.path.join(labels, f"pc59_{split}"), os.path.join(labels, f"pc459_{split}")
        for folder in outputs:
            os.makedirs(folder, exist_ok=True)
        job = functools.partial(convert, source=source, outputs=outputs, force=args.force)
        run_jobs(job, names, workers=args.workers, description=split)
        for folder, suffix, num_classes, ignore_label in zip(
            outputs, (".png", ".tif"), (59, 459), (255, 65535), strict=True
        ):
            verify_labels(
                folder,
                [name + suffix for name in names],
                num_classes=num_classes,
                ignore_label=ignore_label,
                workers=args.workers,
                image_root=os.path.join(base, "JPEGImages"),
            )
        print(f"{len(names)} label images in each of {outputs[0]} and {outputs[1]}")
    return 0


if __name__ == "__main__":
    run_script(main)
