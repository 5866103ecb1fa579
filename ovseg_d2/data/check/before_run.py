"""Looks at datasets before a run: every problem that needs no decoding is one line before the first iteration."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ovseg_d2.data.vocabulary import vocabulary_from_metadata

#: Meta-architectures whose classifier has one output a class, unless the config says otherwise.
_CLOSED_VOCABULARY = ("Mask2Former", "DenseCLIP", "MTACLIP")


def has_closed_vocabulary(cfg: Any, *, training: bool = False) -> bool:
    """Whether the classes are those of ``MODEL.SEM_SEG_HEAD.NUM_CLASSES``, so that all datasets must have the same.

    MTA-CLIP can match masks with texts of any vocabulary: instead of a classifier, or at test beside one that training
    still needs.
    """
    if cfg.MODEL.META_ARCHITECTURE != "MTACLIP":
        return cfg.MODEL.META_ARCHITECTURE in _CLOSED_VOCABULARY
    has_head = cfg.MODEL.OVSEG.PROPOSALS.CLASS_HEAD == "linear"
    return has_head and (training or cfg.MODEL.OVSEG.MTA_CLIP.SCORE == "head")


def require_registered(name: str) -> None:
    """``ValueError`` with the nearest known names unless ``name`` is registered."""
    known = DatasetCatalog.list()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "python -m ovseg_d2.data.check lists those that are"
        raise ValueError(f"dataset {name!r} is not registered; {hint}")


def load_dataset_dicts(name: str, *, filter_empty: bool) -> list[dict[str, Any]]:
    """Dicts of a registered dataset, each with its ``dataset_name``.

    Args:
        filter_empty: leave out images without any annotation that is no crowd (segments of panoptic datasets, objects
            of instance datasets; semantic label files are not opened).
    """
    require_registered(name)
    metadata = MetadataCatalog.get(name)
    try:
        records = DatasetCatalog.get(name)
    except FileNotFoundError as error:
        # Raised by our readers in one line; by detectron2's as a bare path.
        reason = str(error) if error.errno is None else f"{error.filename} does not exist"
        raise FileNotFoundError(f"dataset {name!r}: {reason}{_hint(metadata)}") from None
    except (AssertionError, KeyError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise ValueError(f"dataset {name!r}: {reason}") from error
    if filter_empty:
        records = [record for record in records if _has_annotations(record)]
    if not records:
        raise ValueError(f"dataset {name!r} has no {'annotated ' if filter_empty else ''}images")
    return [{**record, "dataset_name": name} for record in records]


def _has_annotations(record: dict[str, Any]) -> bool:
    for key in ("segments_info", "annotations"):
        if key in record:
            return any(not annotation.get("iscrowd", 0) for annotation in record[key])
    return True


def _hint(metadata: Any) -> str:
    command = getattr(metadata, "prepare_hint", "see datasets/README.md for the layout")
    return f" ({command}; DETECTRON2_DATASETS is {os.getenv('DETECTRON2_DATASETS', 'not set: datasets')})"


def check_dataset(cfg: Any, dataset_names: str | Sequence[str]) -> None:
    """Check registered datasets against their files and the configuration.

    Args:
        cfg: the configuration of the run.
        dataset_names: names out of ``DATASETS.TRAIN`` and ``DATASETS.TEST``.

    Raises:
        ValueError: an unknown name, a category outside the table, classes other than the model's.
        FileNotFoundError: a missing folder, annotation file, image or label file.
    """
    names = (dataset_names,) if isinstance(dataset_names, str) else tuple(dict.fromkeys(dataset_names))
    for name in names:
        require_registered(name)
        _check_folders(name, _needed_keys(cfg, name))
        records = load_dataset_dicts(name, filter_empty=False)
        _check_classes(cfg, name)
        _check_seen(cfg, name)
        check_categories(name, records)
        for key in _needed_keys(cfg, name):
            check_files(name, records, key)
        check_every_label_has_an_image(name, records)
    closed = [name for name in names if has_closed_vocabulary(cfg, training=name in cfg.DATASETS.TRAIN)]
    if closed:
        _check_same_names(closed)


def _needed_keys(cfg: Any, name: str) -> tuple[str, ...]:
    """The keys of dataset dicts whose files this run opens."""
    tasks = cfg.MODEL.OVSEG.TEST.TASKS
    is_panoptic = hasattr(MetadataCatalog.get(name), "panoptic_root")
    on_annotated_masks = cfg.MODEL.OVSEG.PROPOSALS.NAME == "GroundTruthProposals"
    keys = ["file_name"]
    if is_panoptic and (name in cfg.DATASETS.TRAIN or "panoptic" in tasks or on_annotated_masks):
        keys.append("pan_seg_file_name")
    if name in cfg.DATASETS.TEST and "semantic" in tasks or not is_panoptic:
        keys.append("sem_seg_file_name")
    return tuple(keys)


def _check_folders(name: str, keys: Iterable[str]) -> None:
    metadata = MetadataCatalog.get(name)
    folder_keys = {"file_name": "image_root", "pan_seg_file_name": "panoptic_root", "sem_seg_file_name": "sem_seg_root"}
    for key in keys:
        folder = getattr(metadata, folder_keys[key], None)
        if folder is not None and not PathManager.isdir(folder):
            raise FileNotFoundError(f"dataset {name!r}: folder {folder} does not exist{_hint(metadata)}")


def check_files(name: str, records: Sequence[dict[str, Any]], key: str) -> None:
    """Compare with one listing a folder, which takes seconds where a look at each file would take minutes."""
    paths = [record[key] for record in records if key in record]
    listings: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, file = os.path.split(path)
        if folder not in listings:
            listings[folder] = set(PathManager.ls(folder)) if PathManager.isdir(folder) else set()
        if file not in listings[folder]:
            missing.append(path)
    if missing:
        metadata = MetadataCatalog.get(name)
        source = getattr(metadata, "panoptic_json", None) or getattr(metadata, "json_file", None) or "its label files"
        raise FileNotFoundError(
            f"dataset {name!r}: {missing[0]} does not exist, though {source} names it "
            f"({len(missing)} of {len(paths)} files are missing)"
        )


def check_every_label_has_an_image(name: str, records: Sequence[dict[str, Any]]) -> None:
    """detectron2 pairs a folder of labels with a folder of images and silently drops what has no partner."""
    metadata = MetadataCatalog.get(name)
    if getattr(metadata, "evaluator_type", None) != "sem_seg" or not hasattr(metadata, "sem_seg_root"):
        return
    paired = {os.path.basename(record["sem_seg_file_name"]) for record in records}
    suffixes = {os.path.splitext(file)[1] for file in paired}
    labels = [file for file in PathManager.ls(metadata.sem_seg_root) if os.path.splitext(file)[1] in suffixes]
    alone = sorted(set(labels) - paired)
    if alone:
        raise FileNotFoundError(
            f"dataset {name!r}: label {os.path.join(metadata.sem_seg_root, alone[0])} has no image in "
            f"{metadata.image_root} ({len(alone)} of {len(labels)} labels)"
        )


def check_categories(name: str, records: Sequence[dict[str, Any]]) -> None:
    num_classes = len(vocabulary_from_metadata(MetadataCatalog.get(name)))
    for record in records:
        for annotation in record.get("segments_info", record.get("annotations", ())):
            if not 0 <= annotation["category_id"] < num_classes:
                raise ValueError(
                    f"dataset {name!r}: {record['file_name']} has category {annotation['category_id']}, "
                    f"expected 0..{num_classes - 1}"
                )


def _check_classes(cfg: Any, name: str) -> None:
    if not has_closed_vocabulary(cfg, training=name in cfg.DATASETS.TRAIN):
        return
    num_classes = len(vocabulary_from_metadata(MetadataCatalog.get(name)))
    if cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES != num_classes:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES}, but dataset {name!r} has "
            f"{num_classes} classes; a model of a closed vocabulary needs the same"
        )


def _check_seen(cfg: Any, name: str) -> None:
    """A training set of the unseen classes alone is a mistake: it has nothing that training may name."""
    vocabulary = vocabulary_from_metadata(MetadataCatalog.get(name))
    if name in cfg.DATASETS.TRAIN and vocabulary.is_seen and not any(vocabulary.is_seen):
        raise ValueError(
            f"DATASETS.TRAIN has {name!r}, whose {len(vocabulary)} classes ({', '.join(vocabulary.names[:3])}, ...) "
            "are all unseen in its zero-shot split; expected the set of the seen classes (base, seen)"
        )


def _check_same_names(names: Sequence[str]) -> None:
    vocabularies = {name: vocabulary_from_metadata(MetadataCatalog.get(name)).names for name in names}
    first, *others = names
    for other in others:
        for index, (a, b) in enumerate(zip(vocabularies[first], vocabularies[other], strict=True)):
            if a != b:
                raise ValueError(
                    f"class {index} is {a!r} in dataset {first!r} and {b!r} in {other!r}; a model of a closed "
                    "vocabulary needs the same classes in the same order"
                )
