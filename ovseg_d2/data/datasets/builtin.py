"""COCO panoptic and ADE20K: what detectron2 does not register itself, in the folder layouts of the public projects.

detectron2 has COCO instances (``coco_2017_{train,val}``), ADE20K semantic (``ade20k_sem_seg_{train,val}``) and all of
Cityscapes; `datasets/README.md` shows every layout.
"""

from __future__ import annotations

import os

from detectron2.data import DatasetCatalog, MetadataCatalog

from ovseg_d2.data.datasets.class_tables import class_table
from ovseg_d2.data.datasets.coco_format import (
    load_coco_instances,
    metadata_from_categories,
    register_coco_panoptic,
    register_dataset,
)


def register_coco(root: str) -> None:
    """``coco_2017_{train,val}_panoptic_with_sem_seg``: 133 classes, 80 of them things."""
    coco = os.path.join(root, "coco")
    for split in ("train", "val"):
        name = f"coco_2017_{split}_panoptic_with_sem_seg"
        if name in DatasetCatalog.list():
            continue
        register_coco_panoptic(
            name=name,
            image_root=os.path.join(coco, f"{split}2017"),
            panoptic_json=os.path.join(coco, "annotations", f"panoptic_{split}2017.json"),
            panoptic_root=os.path.join(coco, f"panoptic_{split}2017"),
            instances_json=os.path.join(coco, "annotations", f"instances_{split}2017.json"),
            semantic_root=os.path.join(coco, f"panoptic_semseg_{split}2017"),
            categories=class_table("coco_panoptic"),
            prepare_hint="python datasets/prepare_coco.py",
        )


def register_ade20k(root: str) -> None:
    """``ade20k_{panoptic,instance}_{train,val}``: 150 classes, 100 of them things."""
    table = class_table("ade20k_150")
    metadata = metadata_from_categories(table)
    things = metadata_from_categories([category for category in table if category["isthing"]])
    hint = {"prepare_hint": "python datasets/prepare_ade20k.py"}
    base = os.path.join(root, "ADEChallengeData2016")
    for split, folder in (("train", "training"), ("val", "validation")):
        image_root = os.path.join(base, "images", folder)
        instances_json = os.path.join(base, f"ade20k_instance_{split}.json")

        name = f"ade20k_panoptic_{split}"
        if name not in DatasetCatalog.list():
            register_coco_panoptic(
                name=name,
                image_root=image_root,
                panoptic_json=os.path.join(base, f"ade20k_panoptic_{split}.json"),
                panoptic_root=os.path.join(base, f"ade20k_panoptic_{split}"),
                instances_json=instances_json,
                semantic_root=os.path.join(base, "annotations_detectron2", folder),
                categories=table,
                evaluator_type="ade20k_panoptic_seg",
                **hint,
            )

        name = f"ade20k_instance_{split}"
        if name not in DatasetCatalog.list():
            register_dataset(
                name,
                lambda name=name, json_file=instances_json, images=image_root: load_coco_instances(
                    name, json_file, images
                ),
                image_root=image_root,
                json_file=instances_json,
                evaluator_type="coco",
                **{key: things[key] for key in ("thing_classes", "thing_colors", "thing_dataset_id_to_contiguous_id")},
                **hint,
            )

        # Registered by detectron2, without colours and with a stray blank in a name that cannot be changed any more.
        semantic = MetadataCatalog.get(f"ade20k_sem_seg_{split}")
        for key, value in {"stuff_colors": metadata["stuff_colors"], **hint}.items():
            if not hasattr(semantic, key):
                semantic.set(**{key: value})
