"""COCO-Stuff, Pascal VOC, Pascal Context and ADE20K with label images: the table of their layouts and names.

Names are those of Mask2Former, MAFT, ZSSeg and FreeSeg; beside them stand CAT-Seg's (FGA-seg and SED have the same) and
ZegFormer's with its order of classes (the seen before the unseen). A zero-shot view is read from the label files of all
classes; the ``_base`` and ``_novel`` folders that ZSSeg's scripts write are used where they exist, and so are those of
FC-CLIP's and CAT-Seg's scripts. `datasets/README.md` shows all layouts; :mod:`.synonym_views` adds FC-CLIP's names with
synonyms.
"""

from __future__ import annotations

from ovseg_d2.data.datasets.class_tables import class_names, open_vocabulary_texts
from ovseg_d2.data.datasets.labelled_images import LabelledImages, Layout, View, register_rows

_PLAIN = View()
_ALL = View(subset="all", scored_apart=True)
_BASE, _NOVEL = View(subset="seen", own_folder="_base"), View(subset="unseen", own_folder="_novel")
_SEEN, _UNSEEN = View(subset="seen"), View(subset="unseen")

# ZegFormer and MAFT spell one class each in their own way.
_ZEGFORMER_VOC = {"pottedplant": "potted plant"}
_MAFT_VOC = {"tvmonitor": "tv"}
_VOC = tuple(_MAFT_VOC.get(name, name) for name in class_names("voc_20"))
# The classes of Pascal Context that VOC calls background.
_BACKGROUND = tuple(name for name in class_names("pascal_context_59") if name not in class_names("voc_20"))
#: Background is the first class (label 20 in our files), as in the benchmark's own numbers.
_VOC_21 = View(
    classes=("background", *_VOC),
    label_ids=(20, *range(20)),
    num_labels=21,
    metadata={
        "class_synonyms": [
            ["background", *(text for texts in open_vocabulary_texts(_BACKGROUND) for text in texts)],
            *open_vocabulary_texts(_VOC),
        ]
    },
)
#: PAS-20b of CAT-Seg: background counts, and has the names of 39 classes. As targets it is no class, because no single
#: name stands for it.
_VOC_20B = View(
    classes=(*_VOC, *_BACKGROUND),
    label_ids=tuple(range(20)),
    num_labels=21,
    metadata={"background_label": 20},
)


def _stuff(part: str, num_images: int) -> tuple[Layout, ...]:
    """Our folders, which are those of ZSSeg, and CAT-Seg's."""
    return (
        Layout("coco", part, f"stuffthingmaps_detectron2/{part}", num_images),
        Layout("coco-stuff", f"images/{part}", f"annotations_detectron2/{part}", num_images),
    )


def _voc(fcclip: str, part: str, folder: str, num_images: int, num_fcclip: int) -> tuple[Layout, ...]:
    """Our folder, that of ZSSeg and FreeSeg, and CAT-Seg's of the validation images, each with or without VOCdevkit
    above it; and FC-CLIP's."""
    has_background = folder.endswith("background")
    folders = [f"{folder}/{part}"] + [f"annotations_detectron2/{part}"] * (not has_background)
    if part == "val":
        folders.append("annotations_detectron2_bg" if has_background else "annotations_detectron2")
    return (
        *(
            Layout(base, "JPEGImages", labels, num_images)
            for base in ("VOCdevkit/VOC2012", "VOC2012")
            for labels in folders
        ),
        Layout(
            "pascal_voc_d2",
            f"images/{_LONG[part]}",
            f"{fcclip}/{_LONG[part]}",
            num_fcclip,
            own_numbers=has_background,
        ),
    )


def _context(part: str, ours: str, fcclip: str, num_images: int, catseg_ignore_label: int) -> tuple[Layout, ...]:
    """Our folder, which is also MAFT's, with either's images, CAT-Seg's, and FC-CLIP's."""
    labels = f"annotations_detectron2_ovs/{ours}_{part}"
    catseg = f"annotations_detectron2/{ours}_{part}"
    return (
        *(
            Layout(base, images, labels, num_images)
            for base in ("VOC2010", "VOCdevkit/VOC2010")
            for images in ("JPEGImages", f"{part}/image")
        ),
        Layout("VOCdevkit/VOC2010", "JPEGImages", catseg, num_images, ignore_label=catseg_ignore_label),
        Layout("pascal_ctx_d2", f"images/{_LONG[part]}", f"{fcclip}/{_LONG[part]}", num_images),
    )


_LONG = {"train": "training", "val": "validation"}
_STUFF = {"table": "coco_stuff_171", "prepare": "prepare_coco_stuff.py"}
_STUFF_10K = {"table": "coco_stuff_171", "prepare": "prepare_coco_stuff.py --version 10k"}
_VOC_ROW = {"table": "voc_20", "prepare": "prepare_voc.py"}
_CONTEXT = {"prepare": "prepare_pascal_context.py"}
_ADE_FULL = {"table": "ade20k_847", "prepare": "prepare_ade20k_full.py", "ignore_label": 65535}
_ADE = {"table": "ade20k_150", "prepare": "prepare_ade20k.py --only semantic"}

TABLE: tuple[LabelledImages, ...] = (
    LabelledImages(
        **_STUFF,
        layouts=_stuff("train2017", 118_287),
        views={
            "coco_2017_train_stuff_sem_seg": _ALL,
            "coco_2017_train_stuff_base_sem_seg": _BASE,
            "coco_2017_train_stuff_novel_sem_seg": _NOVEL,
            "coco_2017_train_stuff_seen_sem_seg": _SEEN,
            "coco_2017_train_stuff_all_sem_seg": _PLAIN,
        },
    ),
    LabelledImages(
        **_STUFF,
        layouts=_stuff("val2017", 5_000),
        views={
            "coco_2017_test_stuff_sem_seg": _ALL,
            "coco_2017_test_stuff_base_sem_seg": _BASE,
            "coco_2017_test_stuff_novel_sem_seg": _NOVEL,
            "coco_2017_test_stuff_seen_sem_seg": _SEEN,
            "coco_2017_val_unseen_stuff_seen_sem_seg": _UNSEEN,
            "coco_2017_val_all_stuff_sem_seg": View(subset="all", seen_first=True),
            "coco_2017_test_stuff_all_sem_seg": _PLAIN,
        },
    ),
    LabelledImages(
        **_STUFF_10K,
        layouts=(Layout("coco/coco_stuff_10k", "images_detectron2/train", "annotations_detectron2/train", 9_000),),
        views={"coco_2017_train_stuff_10k_sem_seg": _PLAIN},
    ),
    LabelledImages(
        **_STUFF_10K,
        layouts=(Layout("coco/coco_stuff_10k", "images_detectron2/test", "annotations_detectron2/test", 1_000),),
        views={"coco_2017_test_stuff_10k_sem_seg": _PLAIN},
    ),
    LabelledImages(
        **_VOC_ROW,
        layouts=_voc("annotations_pascal20", "train", "annotations_ovs", 10_582, 1_464),
        views={
            "voc_sem_seg_train": _ALL,
            "voc_base_sem_seg_train": _BASE,
            "voc_novel_sem_seg_train": _NOVEL,
            "pascal_voc_train_seen_sem_seg": View(subset="seen", rename=_ZEGFORMER_VOC),
        },
    ),
    LabelledImages(
        **_VOC_ROW,
        layouts=_voc("annotations_pascal20", "val", "annotations_ovs", 1_449, 1_449),
        views={
            "voc_sem_seg_test": _ALL,
            "voc_base_sem_seg_test": _BASE,
            "voc_novel_sem_seg_test": _NOVEL,
            "pascal_voc_test_seen_sem_seg": View(subset="seen", rename=_ZEGFORMER_VOC),
            "pascal_voc_val_unseen_sem_seg": View(subset="unseen", rename=_ZEGFORMER_VOC),
            "pascal_voc_val_all_sem_seg": View(subset="all", rename=_ZEGFORMER_VOC),
            # For models that were trained elsewhere: no split.
            "voc_sem_seg_val": View(rename=_MAFT_VOC),
            "voc_2012_test_sem_seg": View(rename=_MAFT_VOC),
        },
    ),
    LabelledImages(
        **_VOC_ROW,
        layouts=_voc("annotations_pascal21", "train", "annotations_ovs_background", 10_582, 1_464),
        views={"voc_21_sem_seg_train": _VOC_21},
    ),
    LabelledImages(
        **_VOC_ROW,
        layouts=_voc("annotations_pascal21", "val", "annotations_ovs_background", 1_449, 1_449),
        views={"voc_21_sem_seg_val": _VOC_21},
    ),
    LabelledImages(
        **_VOC_ROW,
        layouts=_voc("", "val", "annotations_ovs_background", 1_449, 0)[:-1],
        views={"voc_background_sem_seg_val": _VOC_20B, "voc_2012_test_background_sem_seg": _VOC_20B},
    ),
    *(
        LabelledImages(
            **_CONTEXT,
            table="pascal_context_59",
            layouts=_context(part, "pc59", "annotations_ctx59", num_images, 255),
            views={
                f"pcontext_sem_seg_{part}": _PLAIN,
                f"pcontext_base_sem_seg_{part}": _BASE,
                f"pcontext_novel_sem_seg_{part}": _NOVEL,
                f"pcontext_zero_shot_sem_seg_{part}": _ALL,
                **more,
            },
        )
        for part, num_images, more in (("train", 4_998, {}), ("val", 5_105, {"context_59_test_sem_seg": _PLAIN}))
    ),
    *(
        LabelledImages(
            **_CONTEXT,
            table="pascal_context_459",
            layouts=_context(part, "pc459", "annotations_ctx459", num_images, 459),
            views={f"pcontext_full_sem_seg_{part}": _PLAIN, **more},
            ignore_label=65535,
        )
        for part, num_images, more in (("train", 4_998, {}), ("val", 5_105, {"context_459_test_sem_seg": _PLAIN}))
    ),
    *(
        LabelledImages(
            **_ADE_FULL,
            layouts=tuple(
                Layout(base, f"images_detectron2/{_LONG[part]}", f"annotations_detectron2/{_LONG[part]}", num_images)
                for base in ("ADE20K_2021_17_01", "ade/ADE20K_2021_17_01")
            ),
            views={f"ade20k_full_sem_seg_{part}": _PLAIN, f"ade20k_full_sem_seg_freq_{part}": _SEEN, **more},
        )
        for part, num_images, more in (
            ("train", 25_574, {}),
            (
                "val",
                2_000,
                {"ade20k_full_sem_seg_freq_val_unseen": _UNSEEN, "ade20k_full_sem_seg_freq_val_all": _ALL},
            ),
        )
    ),
    *(
        LabelledImages(
            **_ADE,
            layouts=(
                Layout(
                    "ADEChallengeData2016", f"images/{_LONG[part]}", f"annotations_detectron2/{_LONG[part]}", num_images
                ),
            ),
            views={f"ade20k_base_sem_seg_{part}": _BASE, f"ade20k_novel_sem_seg_{part}": _NOVEL, **more},
        )
        for part, num_images, more in (
            ("train", 20_210, {}),
            ("val", 2_000, {"ade20k_zero_shot_sem_seg_val": _ALL, "ade20k_150_test_sem_seg": _PLAIN}),
        )
    ),
)


def register_labelled_images(root: str) -> None:
    """Register the table's datasets below ``root``."""
    register_rows(TABLE, root)
