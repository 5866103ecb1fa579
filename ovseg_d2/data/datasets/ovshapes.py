"""OVShapes, a generated open-vocabulary world: its vocabulary, its seen/unseen split and its registrations.

Eight colours times eight shapes are 64 things ("red star"), on eight textured stuffs ("grass"). Sixteen things and two
stuffs are unseen in training, yet every colour and every shape occurs in seen classes, so that a model can name an
unseen thing only by combining what it knows. `datasets/prepare_ovshapes.py` writes the files.

Class indices: things 0..63 (colour-major), stuffs 64..71. Category ids in the annotation files are index + 1; the
``_seen`` variants keep the ids and leave the unseen categories out.
"""

from __future__ import annotations

import os

from ovseg_d2.data.datasets.coco_format import (
    load_coco_instances,
    load_semantic_folder,
    metadata_from_categories,
    register_coco_panoptic,
    register_dataset,
)
from ovseg_d2.data.datasets.ovshapes_scene import COLORS, NUM_CLASSES, NUM_THINGS, SHAPES, STUFFS

#: All 72 names in class order.
CLASS_NAMES: tuple[str, ...] = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES) + STUFFS

#: Stuffs that training never names.
UNSEEN_STUFFS: tuple[str, ...] = ("water", "stone")

#: Displayed colour (RGB) of each stuff.
_STUFF_COLORS = {
    "grass": (86, 122, 46),
    "brick": (152, 82, 62),
    "wood": (142, 100, 60),
    "water": (44, 118, 136),
    "sand": (208, 184, 138),
    "sky": (140, 184, 226),
    "stone": (100, 102, 106),
    "tile": (190, 190, 196),
}

PREPARE_HINT = "python datasets/prepare_ovshapes.py"


def is_thing(class_id: int) -> bool:
    """Whether class ``class_id`` in [0, 72) is a thing."""
    return class_id < NUM_THINGS


def is_seen(class_id: int) -> bool:
    """Whether class ``class_id`` in [0, 72) is named in training.

    Of every colour and of every shape exactly two combinations are unseen (two cyclic diagonals of the 8 x 8 table).
    """
    if not is_thing(class_id):
        return STUFFS[class_id - NUM_THINGS] not in UNSEEN_STUFFS
    color, shape = divmod(class_id, len(SHAPES))
    return (shape - color) % len(SHAPES) not in (0, 3)


#: Indices of the 54 seen classes, in class order: contiguous id -> class index of the ``_seen`` variants.
SEEN_CLASS_IDS: tuple[int, ...] = tuple(i for i in range(NUM_CLASSES) if is_seen(i))
UNSEEN_CLASS_IDS: tuple[int, ...] = tuple(i for i in range(NUM_CLASSES) if not is_seen(i))


def display_color(class_id: int) -> tuple[int, int, int]:
    """RGB of a class in pictures: near the real colour, a different brightness for each shape."""
    if not is_thing(class_id):
        return _STUFF_COLORS[STUFFS[class_id - NUM_THINGS]]
    color, shape = divmod(class_id, len(SHAPES))
    brightness = 1.0 - 0.06 * shape
    return tuple(int(round(14 + brightness * (value - 14))) for value in list(COLORS.values())[color])


def categories(class_ids: tuple[int, ...] = tuple(range(NUM_CLASSES))) -> list[dict]:
    """COCO ``categories`` entries of the given classes."""
    return [
        {
            "id": i + 1,
            "name": CLASS_NAMES[i],
            "supercategory": "thing" if is_thing(i) else "stuff",
            "isthing": int(is_thing(i)),
            "color": list(display_color(i)),
        }
        for i in class_ids
    ]


def register_ovshapes(root: str) -> None:
    """Register the panoptic, instance and semantic views of train and val, and the seen-classes-only train set."""
    root = os.path.join(root, "ovshapes")
    everything = tuple(range(NUM_CLASSES))
    for split, suffix, class_ids in [
        ("train", "", everything),
        ("val", "", everything),
        ("train", "_seen", SEEN_CLASS_IDS),
    ]:
        view = split + suffix
        name = f"ovshapes_{view}"
        image_root = os.path.join(root, split)
        instances_json = os.path.join(root, "annotations", f"instances_{view}.json")
        semantic_root = os.path.join(root, f"semantic_{view}")
        table = categories(class_ids)
        things = [category for category in table if category["isthing"]]
        seen = {"class_is_seen": [is_seen(i) for i in class_ids], "prepare_hint": PREPARE_HINT}

        register_coco_panoptic(
            name=name,
            image_root=image_root,
            panoptic_json=os.path.join(root, "annotations", f"panoptic_{view}.json"),
            panoptic_root=os.path.join(root, f"panoptic_{view}"),
            instances_json=instances_json,
            semantic_root=semantic_root,
            categories=table,
            **seen,
        )
        thing_metadata = metadata_from_categories(things)
        register_dataset(
            f"{name}_instance",
            lambda name=name, json=instances_json, images=image_root: load_coco_instances(
                f"{name}_instance", json, images
            ),
            evaluator_type="coco",
            json_file=instances_json,
            image_root=image_root,
            thing_classes=thing_metadata["thing_classes"],
            thing_colors=thing_metadata["thing_colors"],
            thing_dataset_id_to_contiguous_id=thing_metadata["thing_dataset_id_to_contiguous_id"],
            class_is_seen=[is_seen(i) for i in class_ids if is_thing(i)],
            prepare_hint=PREPARE_HINT,
        )
        stuff_metadata = metadata_from_categories(table)
        register_dataset(
            f"{name}_sem_seg",
            lambda labels=semantic_root, images=image_root: load_semantic_folder(labels, images),
            evaluator_type="sem_seg",
            sem_seg_root=semantic_root,
            image_root=image_root,
            stuff_classes=stuff_metadata["stuff_classes"],
            stuff_colors=stuff_metadata["stuff_colors"],
            ignore_label=255,
            **seen,
        )
