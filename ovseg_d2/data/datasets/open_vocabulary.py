"""COCO-Stuff, Pascal VOC, Pascal Context and the full ADE20K, with their zero-shot splits, in the public layouts.

Names are those of MAFT, ZSSeg and FreeSeg; ZegFormer's own names stand beside them, with its order of classes (the seen
before the unseen). A zero-shot view is read from the label files of all classes; the ``_base`` and ``_novel`` folders
that ZSSeg's scripts write are used where they exist. `datasets/README.md` has one table of everything.
"""

from __future__ import annotations

import os
from typing import Any

from detectron2.data import DatasetCatalog

from ovseg_d2.data.datasets.class_tables import class_names, class_table
from ovseg_d2.data.datasets.coco_format import class_color, register_semantic_folder
from ovseg_d2.data.datasets.zero_shot_splits import ZeroShotSplit, builtin_split, register_view

# ZSSeg's word for a subset, in names of datasets and of folders.
_SUFFIXES = {"seen": "base", "unseen": "novel"}


def register_coco_stuff(root: str) -> None:
    """``coco_2017_{train,test}_stuff_{,base_,novel_}sem_seg`` and ZegFormer's three: 171 classes, 156/15."""
    split = builtin_split("coco_stuff_171")
    coco = os.path.join(root, "coco")
    hint = {"prepare_hint": "python datasets/prepare_coco_stuff.py"}
    sets = _evaluation_set(split, [bool(row["isthing"]) for row in class_table("coco_stuff_171")])
    for view, part in (("train", "train2017"), ("test", "val2017")):
        folders = {
            "image_root": os.path.join(coco, part),
            "semantic_root": os.path.join(coco, "stuffthingmaps_detectron2", part),
            "split": split,
            **hint,
        }
        _view(f"coco_2017_{view}_stuff_sem_seg", subset="all", evaluation_set=sets, **folders)
        _published_views(f"coco_2017_{view}_stuff_{{}}_sem_seg", **folders)
        _view(f"coco_2017_{view}_stuff_seen_sem_seg", subset="seen", **folders)
    _view("coco_2017_val_unseen_stuff_seen_sem_seg", subset="unseen", **folders)
    _view("coco_2017_val_all_stuff_sem_seg", subset="all", seen_first=True, **folders)


def register_voc(root: str) -> None:
    """``voc_{,base_,novel_}sem_seg_{train,test}``, MAFT's ``voc_sem_seg_val`` and ZegFormer's: 20 classes, 15/5."""
    split = builtin_split("voc_20")
    base = _existing(os.path.join(root, "VOC2012"), os.path.join(root, "VOCdevkit", "VOC2012"))
    labels = _existing(os.path.join(base, "annotations_detectron2"), os.path.join(base, "annotations_ovs"))
    images = {"image_root": os.path.join(base, "JPEGImages"), "prepare_hint": "python datasets/prepare_voc.py"}
    for view, part in (("train", "train"), ("test", "val")):
        folders = {"semantic_root": os.path.join(labels, part), "split": split, **images}
        sets = _evaluation_set(split)
        _view(f"voc_sem_seg_{view}", subset="all", evaluation_set=sets, **folders)
        _published_views(f"voc_{{}}_sem_seg_{view}", **folders)
        rename = {"pottedplant": "potted plant"}  # ZegFormer's spelling
        _view(f"pascal_voc_{view}_seen_sem_seg", subset="seen", rename=rename, **folders)
    _view("pascal_voc_val_unseen_sem_seg", subset="unseen", rename=rename, **folders)
    _view("pascal_voc_val_all_sem_seg", subset="all", rename=rename, **folders)
    # For models that were trained elsewhere: no split, and MAFT's spelling.
    names = ["tv" if name == "tvmonitor" else name for name in split.classes]
    _plain("voc_sem_seg_val", names, semantic_root=folders["semantic_root"], **images)


def register_pascal_context(root: str) -> None:
    """``pcontext{,_full}_sem_seg_{train,val}``: 59 and 459 classes, to test models that were trained elsewhere."""
    hint = {"prepare_hint": "python datasets/prepare_pascal_context.py"}
    base = _existing(os.path.join(root, "VOCdevkit", "VOC2010"), os.path.join(root, "VOC2010"))
    for part in ("train", "val"):
        images = _existing(os.path.join(base, part, "image"), os.path.join(base, "JPEGImages"))
        for name, table, folder, ignore_label in (
            ("pcontext", "pascal_context_59", "pc59", 255),
            ("pcontext_full", "pascal_context_459", "pc459", 65535),
        ):
            _plain(
                f"{name}_sem_seg_{part}",
                class_names(table),
                image_root=images,
                semantic_root=os.path.join(base, "annotations_detectron2_ovs", f"{folder}_{part}"),
                ignore_label=ignore_label,
                **hint,
            )


def register_ade20k_full(root: str) -> None:
    """``ade20k_full_sem_seg_{train,val}``, 847 classes, and ZegFormer's ``ade20k_full_sem_seg_freq_*``, 572/275."""
    split = builtin_split("ade20k_847")
    base = os.path.join(root, "ADE20K_2021_17_01")
    for part, folder in (("train", "training"), ("val", "validation")):
        files: dict[str, Any] = {
            "image_root": os.path.join(base, "images_detectron2", folder),
            "semantic_root": os.path.join(base, "annotations_detectron2", folder),
            "ignore_label": 65535,
            "prepare_hint": "python datasets/prepare_ade20k_full.py",
        }
        _plain(f"ade20k_full_sem_seg_{part}", split.classes, **files)
        _view(f"ade20k_full_sem_seg_freq_{part}", subset="seen", split=split, **files)
    _view("ade20k_full_sem_seg_freq_val_unseen", subset="unseen", split=split, **files)
    _view("ade20k_full_sem_seg_freq_val_all", subset="all", split=split, evaluation_set=_evaluation_set(split), **files)


def register_ade20k_zero_shot(root: str) -> None:
    """``ade20k_{base,novel}_sem_seg_{train,val}`` and ``ade20k_zero_shot_sem_seg_val``: FreeSeg's 135/15 of 150."""
    split = builtin_split("ade20k_150")
    sets = _evaluation_set(split, [bool(row["isthing"]) for row in class_table("ade20k_150")])
    base = os.path.join(root, "ADEChallengeData2016")
    for part, folder in (("train", "training"), ("val", "validation")):
        folders = {
            "image_root": os.path.join(base, "images", folder),
            "semantic_root": os.path.join(base, "annotations_detectron2", folder),
            "split": split,
            "prepare_hint": "python datasets/prepare_ade20k.py --only semantic",
        }
        for subset, suffix in _SUFFIXES.items():
            _view(f"ade20k_{suffix}_sem_seg_{part}", subset=subset, **folders)
    _view("ade20k_zero_shot_sem_seg_val", subset="all", evaluation_set=sets, **folders)


def _view(name: str, **arguments: Any) -> None:
    if name not in DatasetCatalog.list():
        register_view(name=name, **arguments)


def _published_views(name: str, *, semantic_root: str, **arguments: Any) -> None:
    """The seen and the unseen classes, from a folder of their own (contiguous numbers) if there is one."""
    for subset, suffix in _SUFFIXES.items():
        own = f"{semantic_root}_{suffix}"
        exists = os.path.isdir(own)
        _view(
            name.format(suffix),
            subset=subset,
            semantic_root=own if exists else semantic_root,
            labels_are_classes=exists,
            **arguments,
        )


def _plain(name: str, classes: Any, **arguments: Any) -> None:
    if name not in DatasetCatalog.list():
        colors = [class_color(i) for i in range(len(classes))]
        register_semantic_folder(name=name, classes=classes, stuff_colors=colors, **arguments)


def _evaluation_set(split: ZeroShotSplit, is_thing: list[bool] | None = None) -> dict[str, list[int]]:
    """ZSSeg's sets of classes that are scored apart: base, and the unseen things and stuffs where there are both."""
    sets = {"base": list(split.label_ids("seen"))}
    if is_thing is not None:
        unseen = split.label_ids("unseen")
        sets |= {"novel_thing": [i for i in unseen if is_thing[i]]}
        sets |= {"novel_stuff": [i for i in unseen if not is_thing[i]]}
    return sets


def _existing(preferred: str, otherwise: str) -> str:
    return preferred if os.path.isdir(preferred) else otherwise
