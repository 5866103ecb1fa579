"""Writes small COCO-panoptic datasets for the evaluator tests."""

import json
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from ovseg_d2.evaluation.panoptic_png import write_panoptic_png

# Contiguous class k has dataset id CATEGORIES[k]["id"]; things are not the first classes, as in ADE20K.
CATEGORIES = [
    {"id": 30, "name": "grass", "isthing": 0},
    {"id": 7, "name": "cat", "isthing": 1},
    {"id": 9, "name": "dog", "isthing": 1},
]
GRASS, CAT, DOG = range(3)


def painted(text: str) -> np.ndarray:
    """Segment ids (H, W) from digits, a line a row: '1122' -> [[1, 1, 2, 2]]."""
    return np.array([[int(c) for c in line] for line in text.split()])


def make_dataset(
    root: Path, images: list[tuple[np.ndarray, dict[int, int]]], crowd: set[int] = frozenset()
) -> SimpleNamespace:
    """Registers metadata for images given as (segment ids, {segment id: contiguous class}).

    Returns:
        ``name`` of the dataset and ``inputs``, the dicts that a test loader would yield.
    """
    (root / "png").mkdir()
    inputs, annotations, descriptions = [], [], []
    for image_id, (ids, classes) in enumerate(images):
        write_panoptic_png(root / "png" / f"{image_id}.png", ids)
        Image.fromarray(np.zeros((*ids.shape, 3), dtype=np.uint8)).save(root / f"{image_id}.jpg")
        segments = [
            {"id": i, "category_id": k, "iscrowd": int(i in crowd), "area": int((ids == i).sum())}
            for i, k in classes.items()
        ]
        inputs.append(
            {
                "image_id": image_id,
                "file_name": str(root / f"{image_id}.jpg"),
                "pan_seg_file_name": str(root / "png" / f"{image_id}.png"),
                "segments_info": segments,
            }
        )
        in_file = [s | {"category_id": CATEGORIES[s["category_id"]]["id"]} for s in segments]
        annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": in_file})
        descriptions.append(
            {"id": image_id, "height": ids.shape[0], "width": ids.shape[1], "file_name": f"{image_id}.jpg"}
        )
    tables = {"images": descriptions, "annotations": annotations, "categories": CATEGORIES}
    (root / "panoptic.json").write_text(json.dumps(tables))
    name = f"evaluation_{uuid.uuid4().hex}"
    MetadataCatalog.get(name).set(
        evaluator_type="coco_panoptic_seg",
        panoptic_json=str(root / "panoptic.json"),
        panoptic_root=str(root / "png"),
        stuff_classes=[c["name"] for c in CATEGORIES],
        thing_classes=[c["name"] for c in CATEGORIES if c["isthing"]],
        stuff_dataset_id_to_contiguous_id={c["id"]: k for k, c in enumerate(CATEGORIES)},
        thing_dataset_id_to_contiguous_id={c["id"]: k for k, c in enumerate(CATEGORIES) if c["isthing"]},
        ignore_label=255,
        label_divisor=1000,
    )
    return SimpleNamespace(name=name, inputs=inputs, root=root)


def panoptic_output(ids: np.ndarray, classes: dict[int, int], things: set[int] = frozenset({CAT, DOG})) -> dict:
    """A model's panoptic output from segment ids (H, W) and {segment id: contiguous class}."""
    segments = [{"id": i, "category_id": k, "isthing": k in things} for i, k in classes.items()]
    return {"panoptic_seg": (torch.from_numpy(ids).int(), segments)}


def sem_seg_output(labels: np.ndarray, num_classes: int = len(CATEGORIES)) -> dict:
    """A model's semantic output whose argmax is ``labels`` (H, W)."""
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels), num_classes)
    return {"sem_seg": one_hot.permute(2, 0, 1).float()}


def instances_output(masks: list[np.ndarray], scores: list[float], classes: list[int], size: tuple[int, int]) -> dict:
    """A model's instances from boolean masks (H, W); boxes are the masks' boxes."""
    stacked = torch.from_numpy(np.stack(masks)) if masks else torch.zeros((0, *size), dtype=torch.bool)
    instances = Instances(size)
    instances.pred_masks = stacked
    instances.scores = torch.tensor(scores, dtype=torch.float32)
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in (np.nonzero(mask) for mask in masks)]
    instances.pred_boxes = Boxes(torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32))
    return {"instances": instances}
