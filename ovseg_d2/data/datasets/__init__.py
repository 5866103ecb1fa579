"""Importing this package registers COCO, ADE20K and OVShapes below the folder that DETECTRON2_DATASETS names."""

from ovseg_d2.data.datasets.builtin import register_ade20k, register_coco
from ovseg_d2.data.datasets.coco_format import (
    dataset_root,
    register_coco_instances,
    register_coco_panoptic,
    register_from_entries,
    register_semantic_folder,
)
from ovseg_d2.data.datasets.ovshapes import register_ovshapes

__all__ = [
    "dataset_root",
    "register_coco_instances",
    "register_coco_panoptic",
    "register_from_entries",
    "register_semantic_folder",
]

for _register in (register_coco, register_ade20k, register_ovshapes):
    _register(dataset_root())
