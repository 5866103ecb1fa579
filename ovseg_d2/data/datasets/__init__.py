"""Importing this package registers the public datasets and OVShapes below the folder that DETECTRON2_DATASETS names."""

from ovseg_d2.data.datasets.builtin import register_ade20k, register_coco
from ovseg_d2.data.datasets.coco_format import (
    dataset_root,
    register_coco_instances,
    register_coco_panoptic,
    register_semantic_folder,
)
from ovseg_d2.data.datasets.config_entries import register_from_entries
from ovseg_d2.data.datasets.open_vocabulary import (
    register_ade20k_full,
    register_ade20k_zero_shot,
    register_coco_stuff,
    register_pascal_context,
    register_voc,
)
from ovseg_d2.data.datasets.ovshapes import register_ovshapes
from ovseg_d2.data.datasets.zero_shot_splits import register_zero_shot

__all__ = [
    "dataset_root",
    "register_coco_instances",
    "register_coco_panoptic",
    "register_from_entries",
    "register_semantic_folder",
    "register_zero_shot",
]

for _register in (
    register_coco,
    register_ade20k,
    register_coco_stuff,
    register_voc,
    register_pascal_context,
    register_ade20k_full,
    register_ade20k_zero_shot,
    register_ovshapes,
):
    _register(dataset_root())
