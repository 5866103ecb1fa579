"""Zero-shot splits: which classes of a dataset training may name (seen), and which only the evaluation (unseen).

A split is data: a list of names, built in (:func:`builtin_split`) or in a JSON file of your own. From the label files
of all classes it makes three views of a dataset: ``seen`` (training: unseen pixels have no label, and the vocabulary
holds the seen names only), ``unseen``, and ``all`` (the generalised setting: every class competes with every other, and
the scores are of the seen, of the unseen, and their harmonic mean). See MAFT section 5.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ovseg_d2.data.datasets.class_tables import class_names, class_table
from ovseg_d2.data.datasets.coco_format import class_color, load_semantic_folder, read_json, register_dataset

SUBSETS = ("all", "seen", "unseen")

# SPNet's split of COCO-Stuff, the last five of the twenty Pascal VOC classes, FreeSeg's split of ADE20K, and OTSeg's of
# Pascal Context.
_UNSEEN: dict[str, tuple[str, ...]] = {
    "coco_stuff_171": (
        *("cow", "giraffe", "suitcase", "frisbee", "skateboard", "carrot", "scissors", "cardboard", "clouds", "grass"),
        *("playingfield", "river", "road", "tree", "wall-concrete"),
    ),
    "voc_20": ("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    "ade20k_150": (
        *("grass", "table", "armchair", "tub", "fireplace", "river", "computer", "towel", "tv"),
        *("buffet, counter, sideboard", "basket, handbasket", "lake", "traffic light", "monitor", "flag"),
    ),
    "pascal_context_59": (
        *("cow", "motorbike", "sofa", "cat", "boat", "fence", "bird", "tvmonitor", "keyboard", "aeroplane"),
    ),
}
# ZegFormer's split of the full ADE20K: a class that at most so many images show is unseen.
_RARE_IMAGE_COUNT = 10


@dataclass(frozen=True)
class ZeroShotSplit:
    """K classes, each seen or unseen.

    Args:
        classes: K names in the order of the labels 0..K-1.
        unseen: the names that training leaves out.
        seen: the other names; None: all that are not unseen.
        source: what errors name as the split's place.

    Raises:
        ValueError: a name in both lists, twice in one, in none, or not among the classes; an empty list.
    """

    classes: tuple[str, ...]
    unseen: tuple[str, ...]
    seen: tuple[str, ...] | None = None
    source: str = "zero-shot split"

    def __post_init__(self) -> None:
        if self.seen is None:
            unseen = set(self.unseen)
            object.__setattr__(self, "seen", tuple(name for name in self.classes if name not in unseen))
        known = set(self.classes)
        for key in ("seen", "unseen"):
            names: tuple[str, ...] = getattr(self, key)
            if not names:
                raise ValueError(f"{self.source}: no class is {key}; expected at least one")
            self._refuse(f"{key} repeats", [name for i, name in enumerate(names) if name in names[:i]])
            self._refuse(
                f"the dataset's {len(known)} classes lack {key}", [name for name in names if name not in known]
            )
        both = set(self.seen) & set(self.unseen)
        self._refuse("seen and unseen overlap in", [name for name in self.unseen if name in both])
        listed = {*self.seen, *self.unseen}
        self._refuse("neither seen nor unseen is", [name for name in self.classes if name not in listed])

    def _refuse(self, what: str, names: Sequence[str]) -> None:
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise ValueError(f"{self.source}: {what} {', '.join(map(repr, names[:8]))}{more}")

    @property
    def is_seen(self) -> tuple[bool, ...]:
        """K flags."""
        seen = set(self.seen)
        return tuple(name in seen for name in self.classes)

    def label_ids(self, subset: str, *, seen_first: bool = False) -> tuple[int, ...]:
        """Labels of the classes of a subset, in the order of the classes; or the seen before the unseen.

        Raises:
            ValueError: an unknown subset.
        """
        if subset not in SUBSETS:
            raise ValueError(f"subset is {subset!r}; expected one of {', '.join(SUBSETS)}")
        seen = [i for i, flag in enumerate(self.is_seen) if flag]
        unseen = [i for i, flag in enumerate(self.is_seen) if not flag]
        chosen = {"all": seen + unseen, "seen": seen, "unseen": unseen}[subset]
        return tuple(chosen if seen_first else sorted(chosen))


def builtin_split(table: str) -> ZeroShotSplit:
    """The split of a class table: coco_stuff_171 (156/15), voc_20 (15/5), pascal_context_59 (49/10), ade20k_150
    (135/15), ade20k_847 (572/275)."""
    if table == "ade20k_847":
        unseen = tuple(row["name"] for row in class_table(table) if row["image_count"] <= _RARE_IMAGE_COUNT)
    elif table in _UNSEEN:
        unseen = _UNSEEN[table]
    else:
        raise ValueError(
            f"no zero-shot split of {table!r} is built in; expected one of {', '.join([*_UNSEEN, 'ade20k_847'])}"
        )
    return ZeroShotSplit(classes=class_names(table), unseen=unseen, source=f"zero-shot split of {table}")


def split_from_json(path: str, classes: Sequence[str]) -> ZeroShotSplit:
    """A split file, ``{"unseen": ["cow", ...], "seen": [...]}``, of names or numbers of classes; without ``seen`` all
    other classes are seen.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not of this form, or a split that is none (see :class:`ZeroShotSplit`).
    """
    content = read_json(path)
    if not isinstance(content, dict) or "unseen" not in content or not content.keys() <= {"seen", "unseen"}:
        found = sorted(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{path}: expected an object with 'unseen' and maybe 'seen', found {found}")
    for key, names in content.items():
        if not isinstance(names, list) or not all(type(name) in (str, int) for name in names):
            raise ValueError(f"{path}: {key!r} is {names!r:.60}; expected a list of class names or numbers")
    seen = content.get("seen")
    return ZeroShotSplit(
        classes=tuple(classes),
        unseen=_named(content["unseen"], classes, key="unseen", source=path),
        seen=None if seen is None else _named(seen, classes, key="seen", source=path),
        source=path,
    )


def _named(entries: Sequence[str | int], classes: Sequence[str], *, key: str, source: str) -> tuple[str, ...]:
    """Names of classes that are given by name or by number.

    Raises:
        ValueError: a number that no class has.
    """
    for entry in entries:
        if isinstance(entry, int) and not 0 <= entry < len(classes):
            raise ValueError(f"{source}: {key} has class {entry}, expected a name or 0..{len(classes) - 1}")
    return tuple(classes[entry] if isinstance(entry, int) else entry for entry in entries)


def register_zero_shot(
    *,
    name: str,
    image_root: str,
    semantic_root: str,
    classes: Sequence[str] | str,
    subset: str = "all",
    unseen: Sequence[str | int] | None = None,
    split_json: str | None = None,
    ignore_label: int = 255,
) -> None:
    """Register one view of label images of all classes: train on ``subset="seen"``, evaluate on ``"all"``.

    Args:
        image_root: folder of the images.
        semantic_root: folder of label images of the same names, values 0..K-1 or ``ignore_label``.
        classes: the K names, or the name of a class table (``coco_stuff_171``, ``voc_20``, ...).
        subset: seen, unseen or all.
        unseen: the classes that training leaves out, names or numbers.
        split_json: or a file with them (:func:`split_from_json`). With neither, the table's own split is taken.

    Raises:
        ValueError: a split that is none, both ``unseen`` and ``split_json``, or neither for classes without a table.
    """
    is_table = isinstance(classes, str)
    names = class_names(classes) if is_table else tuple(classes)
    if unseen is not None and split_json is not None:
        raise ValueError(f"dataset {name!r} has unseen and split_json; expected one of them")
    if split_json is not None:
        split = split_from_json(split_json, names)
    elif unseen is not None:
        source = f"dataset {name!r}"
        split = ZeroShotSplit(classes=names, unseen=_named(unseen, names, key="unseen", source=source), source=source)
    elif is_table:
        split = builtin_split(classes)
    else:
        raise ValueError(f"dataset {name!r} has no split; expected unseen (a list of names) or split_json (a file)")
    register_view(
        name=name,
        image_root=image_root,
        semantic_root=semantic_root,
        split=split,
        subset=subset,
        ignore_label=ignore_label,
    )


def register_view(
    *,
    name: str,
    image_root: str,
    semantic_root: str,
    split: ZeroShotSplit,
    subset: str,
    ignore_label: int = 255,
    labels_are_classes: bool = False,
    seen_first: bool = False,
    rename: dict[str, str] | None = None,
    **metadata: Any,
) -> None:
    """Register one subset of a split under ``name``.

    Args:
        labels_are_classes: the files hold the subset's own class numbers (a folder that the public tools prepared),
            not those of all classes.
        seen_first: the seen classes before the unseen (ZegFormer's order).
        rename: names to show the text encoder in place of the table's.
        metadata: anything else that the catalog shall know.
    """
    label_ids = split.label_ids(subset, seen_first=seen_first)
    if label_ids != tuple(range(len(split.classes))) and not labels_are_classes:
        metadata |= {"semantic_label_ids": list(label_ids), "semantic_num_labels": len(split.classes)}
    names = [split.classes[i] for i in label_ids]
    register_dataset(
        name,
        lambda: load_semantic_folder(semantic_root, image_root),
        image_root=image_root,
        sem_seg_root=semantic_root,
        evaluator_type="sem_seg",
        stuff_classes=[(rename or {}).get(class_name, class_name) for class_name in names],
        stuff_colors=[class_color(i) for i in label_ids],
        class_is_seen=[split.is_seen[i] for i in label_ids],
        ignore_label=ignore_label,
        **metadata,
    )
