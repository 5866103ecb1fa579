"""COCO and ADE20K with panoptic and instance annotations, and what detectron2's own registrations lack.

detectron2 has COCO instances (``coco_2017_{train,val}``), ADE20K semantic (``ade20k_sem_seg_{train,val}``) and all of
Cityscapes; `datasets/README.md` shows every layout.
"""

from __future__ import annotations

import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.cityscapes import load_cityscapes_instances

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
    for split, num_images in (("train", 118_287), ("val", 5_000)):
        _complete(f"coco_2017_{split}", num_images=num_images)
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
            num_images=num_images,
        )


def register_ade20k(root: str) -> None:
    """``ade20k_{panoptic,instance}_{train,val}``: 150 classes, 100 of them things."""
    table = class_table("ade20k_150")
    metadata = metadata_from_categories(table)
    things = metadata_from_categories([category for category in table if category["isthing"]])
    base = os.path.join(root, "ADEChallengeData2016")
    for split, folder, num_images in (("train", "training", 20_210), ("val", "validation", 2_000)):
        hint = {"prepare_hint": "python datasets/prepare_ade20k.py", "num_images": num_images}
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
        _complete(f"ade20k_sem_seg_{split}", stuff_colors=metadata["stuff_colors"], **hint)


def register_cityscapes(root: str) -> None:
    """``cityscapes_fine_{sem_seg,instance_seg,panoptic}_{train,val}`` are detectron2's; here is how they are prepared
    and how many images they have. Instances are read from the images of ids, not from polygons (which takes shapely).
    """
    script = "cityscapesscripts/preparation/{}.py of pip install cityscapesScripts"
    for split, num_images in (("train", 2_975), ("val", 500)):
        for task, name in (("sem_seg", "createTrainIdLabelImgs"), ("panoptic", "createPanopticImgs")):
            _complete(f"cityscapes_fine_{task}_{split}", prepare_hint=script.format(name), num_images=num_images)
        name = f"cityscapes_fine_instance_seg_{split}"
        _complete(name, num_images=num_images)
        folders = [os.path.join(root, "cityscapes", kind, split) for kind in ("leftImg8bit", "gtFine")]
        DatasetCatalog.remove(name)
        DatasetCatalog.register(
            name,
            lambda folders=folders: load_cityscapes_instances(*folders, from_json=False, to_polygons=False),
        )


def _complete(name: str, **metadata: Any) -> None:
    """Add what the metadata of a registered dataset lacks."""
    known = MetadataCatalog.get(name)
    known.set(**{key: value for key, value in metadata.items() if not hasattr(known, key)})
