"""What the mapper feeds a model: pictures after augmentation, with the masks and names of their targets, on one sheet.

    python datasets/prepare_ovshapes.py
    python tools/visualize_data.py --config-file configs/ovshapes/fcclip.yaml --output output/data.png
    python tools/visualize_data.py --config-file configs/mask2former/ade20k_semantic_R50.yaml \\
        --images 6 --draws 3 --output output/ade20k.png INPUT.CROP.SIZE "[320, 320]"

The first column is the picture as it lies on disk, each of the others one draw of the augmentation (--draws). Pixels
that no mask covers have no target and are hatched, padding, too. With --labels, semantic labels have a second picture.
The caption has the number of targets, and of those that the crop left nothing of.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import ovseg_d2  # noqa: F401  (first: it hides a warning of detectron2's import)

# isort: split
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.env import seed_all_rng
from PIL import Image

from ovseg_d2.data import OVSegDatasetMapper
from ovseg_d2.data.check import load_dataset_dicts
from ovseg_d2.data.image_io import read_image
from ovseg_d2.data.vocabulary import vocabulary_from_metadata
from ovseg_d2.engine.load_config import load_config
from ovseg_d2.visualization import ResultDrawer, contact_sheet, legible_scale


def data_sheet(
    cfg: CfgNode, dataset: str, *, images: int, draws: int, start: int = 0, labels: bool = False
) -> Image.Image:
    """A sheet with a row for each of ``images`` pictures of a dataset.

    Args:
        labels: with the semantic labels beside the targets.

    Raises:
        ValueError: a dataset that cannot be read, or has no picture number ``start``.
    """
    mapper = OVSegDatasetMapper(cfg, is_train=True, dataset_names=dataset)
    records = load_dataset_dicts(dataset, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    if not 0 <= start < len(records):
        raise ValueError(f"--start is {start}; dataset {dataset!r} has pictures 0 to {len(records) - 1}")
    drawer = drawer_of(dataset)
    rows, captions, columns = [], [], ["on disk"]
    for record in records[start : start + images]:
        row, counts = [read_image(record["file_name"], "RGB")], []
        columns = columns[:1]
        for draw in range(draws):
            mapped = mapper(record)
            if mapped is None:
                raise ValueError(f"{record['file_name']} cannot be decoded")
            image = np.ascontiguousarray(mapped["image"].permute(1, 2, 0).numpy())
            image = image if cfg.INPUT.FORMAT == "RGB" else np.ascontiguousarray(image[:, :, ::-1])
            scale = legible_scale(*image.shape[:2])
            targets = mapped["instances"]
            masks = targets.gt_masks.tensor
            row.append(drawer.draw_masks(image, targets.gt_classes, masks, scale=scale, hatch_rest=True))
            columns.append(f"targets, draw {draw + 1}")
            if labels and "sem_seg" in mapped:
                row.append(drawer.draw(image, {"sem_seg": mapped["sem_seg"]}, "semantic", scale=scale, hatch_rest=True))
                columns.append(f"labels, draw {draw + 1}")
            empty = int((~masks.flatten(1).any(1)).sum()) if masks.numel() else 0
            size = f"{image.shape[1]} x {image.shape[0]}"
            counts.append(
                f"{size}, {len(targets)} target{'s' * (len(targets) != 1)}" + (f" ({empty} empty)" if empty else "")
            )
        rows.append(row)
        captions.append(f"{Path(record['file_name']).name}: " + "; ".join(counts))
    title = f"{dataset}, INPUT.TARGETS {cfg.INPUT.TARGETS}, INPUT.PIPELINE {cfg.INPUT.PIPELINE}"
    return contact_sheet(rows, columns=columns, captions=captions, title=title)


def drawer_of(dataset: str) -> ResultDrawer:
    """With the names that the dataset's targets count in, and its colours if it has one for each."""
    metadata = MetadataCatalog.get(dataset)
    names = vocabulary_from_metadata(metadata).names
    drawer = ResultDrawer.from_metadata(metadata)
    return drawer if drawer.class_names == names else ResultDrawer(class_names=names)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, type=Path)
    parser.add_argument("--dataset", help="a registered dataset; default: the first of DATASETS.TRAIN")
    parser.add_argument("--images", type=int, default=4, help="how many pictures (default %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="the first of them (default %(default)s)")
    parser.add_argument("--draws", type=int, default=2, help="of the augmentation, a picture (default %(default)s)")
    parser.add_argument("--labels", action="store_true", help="also the semantic labels, where the mapper gives them")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default %(default)s)")
    parser.add_argument("--output", required=True, type=Path, help="a PNG")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that change the config")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        cfg = load_config(args.config_file, args.opts)
        dataset = args.dataset or next(iter(cfg.DATASETS.TRAIN), None)
        if dataset is None:
            raise ValueError("DATASETS.TRAIN is empty; expected a --dataset")
        if args.images < 1 or args.draws < 1:
            raise ValueError(f"--images is {args.images}, --draws {args.draws}; expected 1 or more of both")
        seed_all_rng(args.seed)
        torch.set_num_threads(1)
        options = {"images": args.images, "draws": args.draws, "start": args.start, "labels": args.labels}
        sheet = data_sheet(cfg, dataset, **options)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
