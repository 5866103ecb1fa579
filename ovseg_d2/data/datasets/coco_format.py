"""Registering data in COCO's formats (panoptic, instances) and in folders of label images (semantic).

The ``register_*`` functions are what a user calls for data of their own; they read nothing but the category table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json
from detectron2.utils.file_io import PathManager

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")


def dataset_root() -> str:
    """The folder that holds all datasets: the environment variable DETECTRON2_DATASETS, ``datasets`` by default."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def register_dataset(name: str, load: Callable[[], list[dict]], **metadata: Any) -> None:
    """Register ``load`` and ``metadata`` under ``name``; a name can be taken once."""
    if name in DatasetCatalog.list():
        raise ValueError(f"dataset {name!r} is registered already; choose another name")
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)


def register_coco_panoptic(
    *,
    name: str,
    image_root: str,
    panoptic_json: str,
    panoptic_root: str,
    instances_json: str | None = None,
    semantic_root: str | None = None,
    categories: Sequence[dict] | None = None,
    evaluator_type: str = "coco_panoptic_seg",
    ignore_label: int = 255,
    **metadata: Any,
) -> None:
    """Register a dataset in COCO's panoptic format.

    Args:
        image_root: folder of the images.
        panoptic_json: annotation file (``images``, ``annotations``, ``categories``).
        panoptic_root: folder of its PNG files.
        instances_json: the things in COCO's instances format; needed to evaluate AP.
        semantic_root: folder of label PNGs with contiguous ids (`datasets/prepare_coco.py` makes it); needed to
            evaluate mIoU, not to train.
        categories: COCO ``categories`` entries (id, name, isthing, optionally color); read from ``panoptic_json`` when
            None.
        metadata: anything else that the catalog shall know, ``class_is_seen`` for instance.
    """
    if categories is None:
        categories = read_json(panoptic_json).get("categories", [])
        if not categories:
            raise ValueError(f"{panoptic_json}: no 'categories'; expected a list of {{id, name, isthing}}")
    table = metadata_from_categories(categories)
    register_dataset(
        name,
        lambda: load_coco_panoptic(
            panoptic_json=panoptic_json,
            image_root=image_root,
            panoptic_root=panoptic_root,
            semantic_root=semantic_root,
            contiguous_ids=table["stuff_dataset_id_to_contiguous_id"],
            thing_ids=table["thing_dataset_id_to_contiguous_id"],
        ),
        image_root=image_root,
        panoptic_json=panoptic_json,
        panoptic_root=panoptic_root,
        json_file=instances_json,
        sem_seg_root=semantic_root,
        evaluator_type=evaluator_type,
        ignore_label=ignore_label,
        label_divisor=1000,
        **table,
        **metadata,
    )


def register_coco_instances(*, name: str, image_root: str, instances_json: str, **metadata: Any) -> None:
    """Register a dataset in COCO's instances format (polygons or RLE); the class table is the file's own."""
    categories = read_json(instances_json).get("categories", [])
    if not categories:
        raise ValueError(f"{instances_json}: no 'categories'; expected a list of {{id, name}}")
    table = metadata_from_categories([{**category, "isthing": 1} for category in categories])
    register_dataset(
        name,
        lambda: load_coco_instances(name, instances_json, image_root),
        image_root=image_root,
        json_file=instances_json,
        evaluator_type="coco",
        **{key: table[key] for key in ("thing_classes", "thing_colors", "thing_dataset_id_to_contiguous_id")},
        **metadata,
    )


def register_semantic_folder(
    *,
    name: str,
    image_root: str,
    semantic_root: str,
    classes: Sequence[str],
    ignore_label: int = 255,
    **metadata: Any,
) -> None:
    """Register images with label images of the same name (uint8 or uint16, values 0..K-1 or ``ignore_label``)."""
    register_dataset(
        name,
        lambda: load_semantic_folder(semantic_root, image_root),
        image_root=image_root,
        sem_seg_root=semantic_root,
        evaluator_type="sem_seg",
        stuff_classes=list(classes),
        ignore_label=ignore_label,
        **metadata,
    )


def metadata_from_categories(categories: Sequence[dict]) -> dict[str, Any]:
    """Class names, colours and id maps of COCO ``categories``, contiguous in the order of the category ids.

    ``stuff_*`` entries cover all K classes (things too), ``thing_*`` entries the things only.
    """
    for category in categories:
        missing = {"id", "name", "isthing"} - set(category)
        if missing:
            raise ValueError(f"category {category}: no {', '.join(sorted(missing))}; expected id, name and isthing")
    table = list(enumerate(sorted(categories, key=lambda category: category["id"])))
    things = [(i, category) for i, category in table if category["isthing"]]
    metadata: dict[str, Any] = {
        "thing_classes": [category["name"] for _, category in things],
        "stuff_classes": [category["name"] for _, category in table],
        "thing_dataset_id_to_contiguous_id": {category["id"]: i for i, category in things},
        "stuff_dataset_id_to_contiguous_id": {category["id"]: i for i, category in table},
    }
    if len(metadata["stuff_dataset_id_to_contiguous_id"]) < len(table):
        raise ValueError("a category id occurs twice in the category table; ids must be distinct")
    metadata["thing_colors"] = [list(category.get("color") or class_color(i)) for i, category in things]
    metadata["stuff_colors"] = [list(category.get("color") or class_color(i)) for i, category in table]
    return metadata


def class_color(index: int) -> list[int]:
    """An RGB made from a class's index (bits spread over the channels, as Pascal VOC does)."""
    rgb, value = [0, 0, 0], index + 1
    for bit in range(7, -1, -1):
        for channel in range(3):
            rgb[channel] |= (value >> channel & 1) << bit
        value >>= 3
    return rgb


def read_json(path: str) -> Any:
    """Parse a JSON file; ``FileNotFoundError`` or ``ValueError`` in one line when that is not possible."""
    if not PathManager.isfile(path):
        raise FileNotFoundError(f"annotation file {path} does not exist")
    with PathManager.open(path) as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None


def load_coco_panoptic(
    *,
    panoptic_json: str,
    image_root: str,
    panoptic_root: str,
    semantic_root: str | None,
    contiguous_ids: dict[int, int],
    thing_ids: dict[int, int],
) -> list[dict]:
    """Dataset dicts of a COCO panoptic file.

    Returns:
        one dict an annotated image: ``file_name``, ``image_id``, ``height`` and ``width`` (when the file has them),
        ``pan_seg_file_name``, ``sem_seg_file_name`` (when there is a folder) and ``segments_info`` with contiguous
        ``category_id`` and ``isthing``.
    """
    content = read_json(panoptic_json)
    images = {image["id"]: image for image in content.get("images", [])}
    dicts = []
    for annotation in content["annotations"]:
        stem = os.path.splitext(annotation["file_name"])[0]
        image = images.get(annotation["image_id"])
        if images and image is None:
            raise ValueError(
                f"{panoptic_json}: the annotation {annotation['file_name']} is of image id {annotation['image_id']!r}, "
                "which is not among 'images'"
            )
        segments = []
        for segment in annotation["segments_info"]:
            category = segment["category_id"]
            if category not in contiguous_ids:
                raise ValueError(
                    f"{panoptic_json}: segment {segment['id']} of {annotation['file_name']} has category id "
                    f"{category}, expected one of the {len(contiguous_ids)} ids of the table "
                    f"({min(contiguous_ids)}..{max(contiguous_ids)})"
                )
            segments.append({**segment, "category_id": contiguous_ids[category], "isthing": category in thing_ids})
        record = {
            "file_name": os.path.join(image_root, image["file_name"] if image else stem + ".jpg"),
            "image_id": annotation["image_id"],
            "pan_seg_file_name": os.path.join(panoptic_root, annotation["file_name"]),
            "segments_info": segments,
        }
        if image and "height" in image and "width" in image:
            record |= {"height": image["height"], "width": image["width"]}
        if semantic_root is not None:
            record["sem_seg_file_name"] = os.path.join(semantic_root, stem + ".png")
        dicts.append(record)
    return dicts


def load_coco_instances(name: str, instances_json: str, image_root: str) -> list[dict]:
    """Dataset dicts of a COCO instances file, by detectron2's reader; also sets the class names of ``name``."""
    if not PathManager.isfile(instances_json):
        raise FileNotFoundError(f"annotation file {instances_json} does not exist")
    try:
        return load_coco_json(instances_json, image_root, name)
    except (KeyError, AssertionError, json.JSONDecodeError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise ValueError(f"{instances_json}: {reason}") from error


def load_semantic_folder(semantic_root: str, image_root: str) -> list[dict]:
    """Dataset dicts of label images and the images of the same names; a label without an image is an error."""
    for folder in (image_root, semantic_root):
        if not PathManager.isdir(folder):
            raise FileNotFoundError(f"folder {folder} does not exist")
    images = {os.path.splitext(file)[0]: file for file in _image_files(image_root)}
    dicts = []
    for label in sorted(_image_files(semantic_root)):
        stem = os.path.splitext(label)[0]
        if stem not in images:
            raise FileNotFoundError(f"label {os.path.join(semantic_root, label)} has no image {stem}.* in {image_root}")
        dicts.append(
            {
                "file_name": os.path.join(image_root, images[stem]),
                "image_id": stem,
                "sem_seg_file_name": os.path.join(semantic_root, label),
            }
        )
    return dicts


def _image_files(folder: str) -> list[str]:
    return [file for file in PathManager.ls(folder) if file.lower().endswith(IMAGE_EXTENSIONS)]
