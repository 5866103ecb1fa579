"""Open-vocabulary views: the datasets under FC-CLIP's names (``openvocab_*``), their classes with synonyms.

Files and annotations are those of the set that a view is of. FC-CLIP, MAFT+ and MaskCLIP++ evaluate with lists of their
own; ``DATASETS.CLASS_TEXTS`` gives a view one of those in place of ours.
"""

from __future__ import annotations

from detectron2.data import DatasetCatalog, MetadataCatalog

from ovseg_d2.data.datasets.class_tables import open_vocabulary_texts
from ovseg_d2.data.vocabulary import vocabulary_from_metadata

_PREFIX = "openvocab_"
#: View (without its prefix) -> dataset; "{}" is train and val.
_VIEWS = {
    "coco_2017_{}_panoptic_with_sem_seg": "coco_2017_{}_panoptic_with_sem_seg",
    "coco_2017_{}": "coco_2017_{}",
    "coco_2017_{}_stuff_sem_seg": "coco_2017_{}_stuff_sem_seg",
    "ade20k_panoptic_{}": "ade20k_panoptic_{}",
    "ade20k_instance_{}": "ade20k_instance_{}",
    "ade20k_sem_seg_{}": "ade20k_sem_seg_{}",
    "ade20k_full_sem_seg_{}": "ade20k_full_sem_seg_{}",
    "cityscapes_fine_panoptic_{}": "cityscapes_fine_panoptic_{}",
    "pascal20_sem_seg_{}": "voc_sem_seg_{}",
    "pascal21_sem_seg_{}": "voc_21_sem_seg_{}",
    "pascal_ctx59_sem_seg_{}": "pcontext_sem_seg_{}",
    "pascal_ctx459_sem_seg_{}": "pcontext_full_sem_seg_{}",
}
# In COCO-Stuff's names, validation is "test"; FC-CLIP has that word and MaskCLIP++ "val".
_STUFF_VAL = {f"coco_2017_{split}_stuff_sem_seg": "coco_2017_test_stuff_sem_seg" for split in ("test", "val")}
#: What belongs to a zero-shot split; these views have none.
_SPLIT_KEYS = ("class_is_seen", "evaluation_set")


def register_synonym_views() -> None:
    """Register all views of datasets that are registered already."""
    views = {view.format(split): name.format(split) for split in ("train", "val") for view, name in _VIEWS.items()}
    for view, name in (views | _STUFF_VAL).items():
        if _PREFIX + view not in DatasetCatalog.list():
            _register(_PREFIX + view, name)


def _register(view: str, name: str) -> None:
    DatasetCatalog.register(view, lambda: DatasetCatalog.get(name))
    source = MetadataCatalog.get(name)
    content = {key: value for key, value in source.as_dict().items() if key not in ("name", *_SPLIT_KEYS)}
    content.setdefault("class_synonyms", open_vocabulary_texts(vocabulary_from_metadata(source).names))
    MetadataCatalog.get(view).set(**content)
