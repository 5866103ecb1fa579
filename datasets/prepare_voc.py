#!/usr/bin/env python
"""Renumber the label images of Pascal VOC 2012 with its augmented training set (20 classes).

Expected below $DETECTRON2_DATASETS (default: datasets), from VOCtrainval_11-May-2012.tar
(http://host.robots.ox.ac.uk/pascal/VOC/voc2012) and SegmentationClassAug.zip (the label images that SBD adds to, as
DeepLab distributes them); a folder VOC2012 without VOCdevkit above it does as well:
  VOCdevkit/VOC2012/JPEGImages/*.jpg
  VOCdevkit/VOC2012/SegmentationClassAug/*.png                 0 background, classes 1..20, 255 border
  VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt             the 1,449 images of the evaluation
Written:
  VOCdevkit/VOC2012/annotations_ovs/{train,val}/*.png          classes 0..19, 255 background and border
  VOCdevkit/VOC2012/annotations_ovs_background/{train,val}/*.png  classes 0..19, 20 background, 255 border

Training images are those of ImageSets/Segmentation/train_aug.txt if there is such a list, else all that are not in
val.txt (the same 10,582). The zero-shot sets (15 seen, 5 unseen) are read from the same files. Finished files are kept.

examples:
  python datasets/prepare_voc.py                               both splits
  python datasets/prepare_voc.py --splits val                  for the evaluation alone
"""

from __future__ import annotations

import functools
import os

from ovseg_d2.data.datasets import dataset_root
from ovseg_d2.data.datasets.class_tables import class_table
from ovseg_d2.data.datasets.conversion import (
    get_parser,
    read_names,
    renumber,
    require_folder,
    run_jobs,
    run_script,
    save_image,
    verify_labels,
)
from ovseg_d2.data.image_io import read_image

LABELS = [row["id"] for row in class_table("voc_20")]


def convert(stem: str, *, source: str, output: str, background: bool, force: bool) -> None:
    """Write the label image of one picture; palette images are read as their indices.

    ``background``: it is one more class, not ignored.
    """
    target = os.path.join(output, stem + ".png")
    if force or not os.path.exists(target):
        path = os.path.join(source, stem + ".png")
        labels = read_image(path)
        if labels.ndim != 2:
            raise ValueError(f"{path} has shape {labels.shape}, expected class indices in one channel")
        class_ids, ignore = ([*LABELS, 0], [255]) if background else (LABELS, [0, 255])
        save_image(target, renumber(labels, class_ids, ignore=ignore, ignore_label=255, path=path))


def image_names(base: str, split: str) -> list[str]:
    """Names of a split's images, without suffix."""
    lists = os.path.join(base, "ImageSets", "Segmentation")
    val = read_names(os.path.join(lists, "val.txt"))
    if split == "val":
        return val
    train = os.path.join(lists, "train_aug.txt")
    if os.path.isfile(train):  # a line may give the paths of an image and of its label
        return [os.path.splitext(os.path.basename(name))[0] for name in read_names(train)]
    labels = os.listdir(os.path.join(base, "SegmentationClassAug"))
    return sorted({os.path.splitext(file)[0] for file in labels if file.endswith(".png")} - set(val))


def main(argv: list[str] | None = None) -> int:
    parser = get_parser(__doc__)
    parser.add_argument("--splits", nargs="+", choices=("train", "val"), default=("train", "val"))
    args = parser.parse_args(argv)
    plain = os.path.join(dataset_root(), "VOC2012")
    has_labels = os.path.isdir(os.path.join(plain, "SegmentationClassAug"))
    base = plain if has_labels else os.path.join(dataset_root(), "VOCdevkit", "VOC2012")
    source = require_folder(os.path.join(base, "SegmentationClassAug"))
    for split in args.splits:
        names = image_names(base, split)
        for folder, background in (("annotations_ovs", False), ("annotations_ovs_background", True)):
            output = os.path.join(base, folder, split)
            os.makedirs(output, exist_ok=True)
            job = functools.partial(convert, source=source, output=output, background=background, force=args.force)
            run_jobs(job, names, workers=args.workers, description=f"{folder}/{split}")
            verify_labels(
                output,
                [name + ".png" for name in names],
                num_classes=len(LABELS) + background,
                ignore_label=255,
                workers=args.workers,
                image_root=os.path.join(base, "JPEGImages"),
            )
            print(f"{len(names)} label images in {output}")
    return 0


if __name__ == "__main__":
    run_script(main)
