#!/usr/bin/env python
"""Generate OVShapes, the embedded open-vocabulary world, below $DETECTRON2_DATASETS (default: datasets).

OVShapes needs no download: 64 things (8 colours x 8 shapes, "red star") on 8 textured stuffs ("grass"), written as
COCO-panoptic data and registered as ovshapes_train, ovshapes_val and their _instance, _sem_seg and _seen variants.
The same settings always give the same pictures, whatever the number of workers.

examples:
  python datasets/prepare_ovshapes.py                          1000 + 200 pictures, about half a minute on two cores
  python datasets/prepare_ovshapes.py --preview contact.png    look at some pictures first, write nothing else
  python datasets/prepare_ovshapes.py --train 8000 --seed 1 --force    replace the world by a larger one
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from dataclasses import asdict

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from ovseg_d2.data.datasets import dataset_root
from ovseg_d2.data.datasets.conversion import run_script
from ovseg_d2.data.datasets.ovshapes import CLASS_NAMES, display_color, is_seen
from ovseg_d2.data.datasets.ovshapes_scene import Scene
from ovseg_d2.data.datasets.ovshapes_writer import WorldSettings, existing_settings, scene, write_world


def get_parser() -> argparse.ArgumentParser:
    defaults = WorldSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=defaults.train, help="training pictures (default: %(default)s)")
    parser.add_argument("--val", type=int, default=defaults.val, help="validation pictures (default: %(default)s)")
    parser.add_argument("--min-size", type=int, default=defaults.min_size, help="shortest side (default: %(default)s)")
    parser.add_argument("--max-size", type=int, default=defaults.max_size, help="longest side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="another seed, another world of the same kind")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="processes (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace an existing world of other settings")
    parser.add_argument("--preview", metavar="PNG", help="only write a contact sheet of training pictures and labels")
    return parser


def label_picture(picture: Scene) -> Image.Image:
    """The segments in their class colours, with black borders."""
    ids = picture.segment_ids
    colors = np.uint8([(0, 0, 0)] + [display_color(class_id) for class_id in picture.class_ids])[ids]
    border = np.zeros(ids.shape, bool)
    border[1:] |= ids[1:] != ids[:-1]
    border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    colors[border] = 0
    return Image.fromarray(colors)


def contact_sheet(settings: WorldSettings, *, rows: int = 4, columns: int = 4) -> Image.Image:
    """Pictures beside their labels, with the class names below (an asterisk marks classes unseen in training)."""
    cell = settings.max_size + 8
    text_height = 76
    sheet = Image.new("RGB", (columns * (2 * cell + 8), rows * (cell + text_height)), "white")
    draw = ImageDraw.Draw(sheet)
    for index in range(rows * columns):
        picture = scene(settings, "train", index)
        left, top = index % columns * (2 * cell + 8), index // columns * (cell + text_height)
        sheet.paste(Image.fromarray(picture.image), (left, top))
        sheet.paste(label_picture(picture), (left + cell, top))
        names = [CLASS_NAMES[c] + ("" if is_seen(c) else "*") for c in picture.class_ids]
        lines = [", ".join(names[i : i + 4]) for i in range(0, len(names), 4)]
        draw.multiline_text((left, top + cell - 4), "\n".join(lines), fill="black")
    return sheet


def progress_bar(results: Iterable, total: int, label: str) -> Iterable:
    return tqdm(results, total=total, desc=f"OVShapes {label}", unit="picture")


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    settings = WorldSettings(args.train, args.val, args.min_size, args.max_size, args.seed)
    if args.preview:
        contact_sheet(settings).save(args.preview)
        print(f"contact sheet: {args.preview}")
        return 0
    folder = os.path.join(dataset_root(), "ovshapes")
    found = existing_settings(folder)
    if found == asdict(settings):
        print(f"OVShapes is complete in {folder}")
        return 0
    if found is not None and not args.force:
        raise ValueError(
            f"{folder} holds OVShapes of other settings ({found}); --force replaces it by {asdict(settings)}"
        )
    write_world(folder, settings, workers=args.workers, progress=progress_bar)
    print(f"OVShapes: {settings.train} training and {settings.val} validation pictures in {folder}")
    return 0


if __name__ == "__main__":
    run_script(main)
