"""Registers datasets of images and label images from rows of a table (:mod:`.open_vocabulary` has the public ones)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.data import DatasetCatalog

from ovseg_d2.data.datasets.class_tables import class_names, class_table
from ovseg_d2.data.datasets.coco_format import IMAGE_EXTENSIONS, class_color, register_semantic_folder
from ovseg_d2.data.datasets.zero_shot_splits import ZeroShotSplit, builtin_split, register_view


@dataclass(frozen=True)
class Layout:
    """Folders of images and labels in a base folder, and how many images the public dataset has there.

    ``own_numbers``: the labels are the classes of the view, not to be looked up in its ``label_ids``; ``ignore_label``:
    that of the files, where it is another than the row's.
    """

    base: str
    images: str
    labels: str
    num_images: int
    own_numbers: bool = False
    ignore_label: int | None = None

    def presence(self, root: str) -> tuple[int, bool, bool]:
        """How much of it is below ``root``, to compare: labels, images, the base folder."""
        base = os.path.join(root, self.base)
        return (
            _label_files(os.path.join(base, self.labels)),
            os.path.isdir(os.path.join(base, self.images)),
            os.path.isdir(base),
        )


@dataclass(frozen=True, kw_only=True)
class View:
    """The classes that a name stands for.

    Args:
        subset: of the zero-shot split; None: all classes of the table, without a split.
        own_folder: suffix of the folder where ZSSeg has the labels of this subset.
        seen_first: the seen classes before the unseen.
        scored_apart: with ZSSeg's sets of classes for the evaluation.
        rename: names other than the table's.
        classes: K classes other than the table's.
        label_ids: their labels, or those of the first of them if others have none, among ``num_labels``.
        metadata: what else the catalogue shall know.
    """

    subset: str | None = None
    own_folder: str | None = None
    seen_first: bool = False
    scored_apart: bool = False
    rename: Mapping[str, str] = field(default_factory=dict)
    classes: Sequence[str] | None = None
    label_ids: Sequence[int] = ()
    num_labels: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """A row: one part of a dataset, the layouts that it may have (the usual one first), and the names it goes by."""

    table: str
    prepare: str
    layouts: tuple[Layout, ...]
    views: Mapping[str, View]
    ignore_label: int = 255

    def layout(self, root: str) -> Layout:
        """The layout of which most is there: labels before images before the base folder."""
        return max(self.layouts, key=lambda layout: layout.presence(root))  # the first of equals


def _label_files(folder: str) -> int:
    """2: the folder has label files, 1: it is empty, 0: there is none, or its files are in folders below it."""
    if not os.path.isdir(folder):
        return 0
    with os.scandir(folder) as entries:  # the first file ends it, however many there are
        is_empty = True
        for entry in entries:
            if entry.name.lower().endswith(IMAGE_EXTENSIONS):
                return 2
            is_empty &= not entry.is_dir()
    return int(is_empty)


def register_rows(rows: Iterable[LabelledImages], root: str) -> None:
    """Register every view of every row below ``root``; names that are taken are left alone."""
    for row in rows:
        layout = row.layout(root)
        base = os.path.join(root, layout.base)
        for name, view in row.views.items():
            if name in DatasetCatalog.list():
                continue
            _register(
                name,
                row,
                view,
                image_root=os.path.join(base, layout.images),
                semantic_root=os.path.join(base, layout.labels),
                own_numbers=layout.own_numbers,
                ignore_label=row.ignore_label if layout.ignore_label is None else layout.ignore_label,
                num_images=layout.num_images,
            )


def _register(
    name: str,
    row: LabelledImages,
    view: View,
    *,
    image_root: str,
    semantic_root: str,
    own_numbers: bool,
    ignore_label: int,
    num_images: int,
) -> None:
    metadata: dict[str, Any] = {
        "ignore_label": ignore_label,
        "prepare_hint": f"python datasets/{row.prepare}",
        "num_images": num_images,
        **view.metadata,
    }
    if view.subset is None:
        classes = view.classes or class_names(row.table)
        if view.label_ids and not own_numbers:
            metadata |= {"semantic_label_ids": list(view.label_ids), "semantic_num_labels": view.num_labels}
        register_semantic_folder(
            name=name,
            image_root=image_root,
            semantic_root=semantic_root,
            classes=[view.rename.get(class_name, class_name) for class_name in classes],
            stuff_colors=[class_color(i) for i in range(len(classes))],
            **metadata,
        )
        return
    split = builtin_split(row.table)
    if view.scored_apart:
        metadata["evaluation_set"] = _evaluation_set(row.table, split)
    own_folder = f"{semantic_root}{view.own_folder}"
    has_own_folder = view.own_folder is not None and os.path.isdir(own_folder)
    if has_own_folder:
        del metadata["num_images"]  # images without any of the classes are not in it
    register_view(
        name=name,
        image_root=image_root,
        semantic_root=own_folder if has_own_folder else semantic_root,
        split=split,
        subset=view.subset,
        seen_first=view.seen_first,
        labels_are_classes=has_own_folder,
        rename=dict(view.rename),
        **metadata,
    )


def _evaluation_set(table: str, split: ZeroShotSplit) -> dict[str, list[int]]:
    """ZSSeg's sets of classes that are scored apart: base, and the unseen things and stuffs where there are both."""
    sets = {"base": list(split.label_ids("seen"))}
    is_thing = [bool(category.get("isthing", 0)) for category in class_table(table)]
    if len(set(is_thing)) == 2:
        unseen = split.label_ids("unseen")
        sets |= {"novel_thing": [i for i in unseen if is_thing[i]]}
        sets |= {"novel_stuff": [i for i in unseen if not is_thing[i]]}
    return sets
