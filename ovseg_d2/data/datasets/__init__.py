"""Importing this package registers the public datasets and OVShapes below the folder that DETECTRON2_DATASETS names."""

from ovseg_d2.data.datasets.builtin import register_ade20k, register_cityscapes, register_coco
from ovseg_d2.data.datasets.coco_format import (
    dataset_root,
    register_coco_instances,
    register_coco_panoptic,
    register_semantic_folder,
)
from ovseg_d2.data.datasets.config_entries import register_from_entries
from ovseg_d2.data.datasets.open_vocabulary import register_labelled_images
from ovseg_d2.data.datasets.ovshapes import register_ovshapes
from ovseg_d2.data.datasets.synonym_views import register_synonym_views
from ovseg_d2.data.datasets.zero_shot_splits import register_zero_shot

__all__ = [
    "dataset_root",
    "register_all",
    "register_coco_instances",
    "register_coco_panoptic",
    "register_from_entries",
    "register_semantic_folder",
    "register_zero_shot",
]


def register_all(root: str) -> None:
    """Register every dataset below ``root``; what is registered already is left alone."""
    for register in (register_coco, register_ade20k, register_cityscapes, register_labelled_images):
        register(root)
    register_synonym_views()
    register_ovshapes(root)


register_all(dataset_root())
