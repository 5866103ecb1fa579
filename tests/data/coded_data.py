"""Tiny datasets whose pictures show their own labels, so that image and targets can be compared after any transform.

Red and green are 0 or 200 and give the class: 2 * (green high) + (red high). Blue is high where there is no label.
Every channel has one straight edge: a bilinear resize crosses half height exactly where nearest neighbour switches, so
the class can be read from a resized picture pixel by pixel.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ovseg_d2.config import add_ovseg_config
from ovseg_d2.data.datasets import register_coco_instances, register_coco_panoptic, register_semantic_folder

IGNORE = 255
CROWD_CLASS = 3
NAMES = ("far", "cat", "dog", "near")
# Ids that need all three bytes of a panoptic PNG, and category ids with gaps.
SEGMENT_IDS = (70_001, 300, 5, 1_000_000)
CATEGORIES = [{"id": 10 * i + 3, "name": name, "isthing": int(i in (1, 2))} for i, name in enumerate(NAMES)]
SIZES = ((40, 60), (61, 45), (50, 50))


def coded_image(height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: classes change at 1/3 of the width and 2/5 of the height; the right eighth has no label."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, width // 3 :, 0] = 200
    image[height * 2 // 5 :, :, 1] = 200
    image[:, width - width // 8 :, 2] = 200
    return image


def read_classes(image: torch.Tensor | np.ndarray, ignore: int = IGNORE) -> np.ndarray:
    """Classes (H, W) shown by an image (3, H, W) or (H, W, 3); ``ignore`` where blue is high (128 in the padding)."""
    image = np.asarray(image)
    red, green, blue = (image if image.shape[0] == 3 else image.transpose(2, 0, 1)).astype(int)
    return np.where(blue > 100, ignore, 2 * (green > 100) + (red > 100))


class CodedData:
    """The pictures on disk in all three formats, registered as ``<name>_{panoptic,semantic,instance}``."""

    def __init__(self, root: Path, name: str, sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
        self.root, self.name = root, name
        for folder in ("images", "panoptic", "semantic"):
            (root / folder).mkdir(parents=True)
        images, panoptic, instances = [], [], []
        for index, (height, width) in enumerate(sizes):
            picture = coded_image(height, width)
            classes = read_classes(picture)
            stem = f"picture{index}"
            Image.fromarray(picture).save(root / "images" / f"{stem}.png")
            Image.fromarray(classes.astype(np.uint8)).save(root / "semantic" / f"{stem}.png")
            images.append({"id": index, "file_name": f"{stem}.png", "height": height, "width": width})
            ids = np.append(SEGMENT_IDS, [0])[np.where(classes == IGNORE, len(NAMES), classes)]
            rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
            Image.fromarray(rgb).save(root / "panoptic" / f"{stem}.png")
            segments = [
                {
                    "id": SEGMENT_IDS[c],
                    "category_id": CATEGORIES[c]["id"],
                    "iscrowd": int(c == CROWD_CLASS),
                    "area": int((classes == c).sum()),
                    "bbox": [0, 0, width, height],
                }
                for c in range(len(NAMES))
            ]
            panoptic.append({"image_id": index, "file_name": f"{stem}.png", "segments_info": segments})
            instances += [self._instance(index, c, classes == c) for c in range(len(NAMES))]
        write_json(root / "panoptic.json", {"images": images, "annotations": panoptic, "categories": CATEGORIES})
        annotations = [{**instance, "id": i + 1} for i, instance in enumerate(instances)]
        write_json(root / "instances.json", {"images": images, "annotations": annotations, "categories": CATEGORIES})

    @staticmethod
    def _instance(image_id: int, class_id: int, mask: np.ndarray) -> dict[str, Any]:
        """Class 1 as a polygon, class 2 as an uncompressed RLE, the others as compressed ones."""
        rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
        x, y, width, height = mask_util.toBbox(rle).tolist()
        segmentation: Any = {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}
        if class_id == 1:
            segmentation = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        elif class_id == 2:
            changes = np.flatnonzero(np.diff(np.concatenate([[False], mask.ravel(order="F"), [False]]).astype(int)))
            ends = np.append(changes, mask.size) if changes[-1] != mask.size else changes
            segmentation = {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], ends])).tolist()}
        return {
            "image_id": image_id,
            "category_id": CATEGORIES[class_id]["id"],
            "iscrowd": int(class_id == CROWD_CLASS),
            "bbox": [x, y, width, height],
            "area": int(mask.sum()),
            "segmentation": segmentation,
        }

    def register(self) -> None:
        images = str(self.root / "images")
        register_coco_panoptic(
            name=f"{self.name}_panoptic",
            image_root=images,
            panoptic_json=str(self.root / "panoptic.json"),
            panoptic_root=str(self.root / "panoptic"),
            semantic_root=str(self.root / "semantic"),
        )
        register_semantic_folder(
            name=f"{self.name}_semantic", image_root=images, semantic_root=str(self.root / "semantic"), classes=NAMES
        )
        register_coco_instances(
            name=f"{self.name}_instance", image_root=images, instances_json=str(self.root / "instances.json")
        )

    def unregister(self) -> None:
        for kind in ("panoptic", "semantic", "instance"):
            forget(f"{self.name}_{kind}")


def forget(name: str) -> None:
    """Take a name out of detectron2's catalogues."""
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
    if name in MetadataCatalog.list():
        MetadataCatalog.remove(name)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def data_cfg(dataset: str, *overrides: Any) -> CfgNode:
    """A configuration that trains and tests on ``dataset``: no augmentation, the pictures' own size."""
    cfg = get_cfg()
    add_ovseg_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "Mask2Former"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(NAMES)
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = IGNORE
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (dataset,)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.PIPELINE = "resize"
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.KEEP_EMPTY_MASKS = False
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 7
    cfg.merge_from_list(list(overrides))
    return cfg
