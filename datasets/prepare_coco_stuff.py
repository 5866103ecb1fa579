#!/usr/bin/env python
"""Renumber the label maps of COCO-Stuff (164k images, 171 classes), for training and for evaluation.

Expected below $DETECTRON2_DATASETS (default: datasets), from stuffthingmaps_trainval2017.zip
(https://github.com/nightrome/cocostuff) and the 2017 images of https://cocodataset.org:
  coco/{train2017,val2017}/*.jpg
  coco/stuffthingmaps/{train2017,val2017}/*.png                category id - 1, 255 unlabelled
Written:
  coco/stuffthingmaps_detectron2/{train2017,val2017}/*.png     classes 0..170, 255 unlabelled

The zero-shot sets (156 seen, 15 unseen) are read from the same files; nothing else is needed. Folders of ZSSeg's script
({train2017,val2017}_{base,novel}) are used if you have them. Finished files are kept, so an interrupted run can be
continued.

examples:
  python datasets/prepare_coco_stuff.py                        both splits
  python datasets/prepare_coco_stuff.py --splits val --workers 8
"""

from __future__ import annotations

import functools
import os
import sys

from ovseg_d2.data.datasets import dataset_root
from ovseg_d2.data.datasets.class_tables import class_table
from ovseg_d2.data.datasets.conversion import get_parser, renumber, require_folder, run_jobs, save_image
from ovseg_d2.data.image_io import read_image

#: Values of the 171 classes in the files that are distributed.
LABELS = [row["id"] - 1 for row in class_table("coco_stuff_171")]


def convert(file: str, *, source: str, output: str, force: bool) -> None:
    """Write the label image of one picture."""
    target = os.path.join(output, file)
    if force or not os.path.exists(target):
        path = os.path.join(source, file)
        labels = read_image(path)
        if labels.ndim != 2:
            raise ValueError(f"{path} has shape {labels.shape}, expected one channel")
        save_image(target, renumber(labels, LABELS, ignore=[255], ignore_label=255, path=path))


def main(argv: list[str] | None = None) -> int:
    parser = get_parser(__doc__)
    parser.add_argument("--splits", nargs="+", choices=("train", "val"), default=("train", "val"))
    args = parser.parse_args(argv)
    coco = os.path.join(dataset_root(), "coco")
    for split in args.splits:
        source = require_folder(os.path.join(coco, "stuffthingmaps", f"{split}2017"))
        output = os.path.join(coco, "stuffthingmaps_detectron2", f"{split}2017")
        os.makedirs(output, exist_ok=True)
        files = sorted(file for file in os.listdir(source) if file.endswith(".png"))
        job = functools.partial(convert, source=source, output=output, force=args.force)
        run_jobs(job, files, workers=args.workers, description=split)
        print(f"{len(files)} label images in {output}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
