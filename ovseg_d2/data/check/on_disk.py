"""Looks at a whole dataset on disk: what is missing, and which label files are not what they should be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ovseg_d2.data.check import before_run
from ovseg_d2.data.image_io import annotated_size
from ovseg_d2.data.label_files import LabelFile, Runner, image_size, label_problems
from ovseg_d2.data.vocabulary import vocabulary_from_metadata

#: Metadata of folders and of annotation files, each with what it is called here.
_FOLDERS = {
    "image_root": "images",
    "image_dir": "images",
    "panoptic_root": "panoptic labels",
    "sem_seg_root": "labels",
    "gt_dir": "labels",
}
_ANNOTATIONS = {"panoptic_json": "panoptic annotations", "json_file": "instance annotations"}
#: Keys of dataset dicts that name a file.
_FILE_KEYS = ("file_name", "pan_seg_file_name", "sem_seg_file_name")


@dataclass(frozen=True)
class Finding:
    """A line of the report: what was looked at, and what is wrong with it, or else how much of it there is."""

    what: str
    text: str
    is_problem: bool


def project_datasets() -> list[str]:
    """Names of the public datasets that the project knows, and of OVShapes."""
    keys = ("prepare_hint", "num_images")
    return [name for name in sorted(DatasetCatalog.list()) if any(hasattr(MetadataCatalog.get(name), k) for k in keys)]


def missing_places(name: str) -> list[str]:
    """Folders and annotation files of a dataset that are not there."""
    metadata = MetadataCatalog.get(name)
    folders = [getattr(metadata, key) for key in _FOLDERS if getattr(metadata, key, None)]
    files = [getattr(metadata, key) for key in _ANNOTATIONS if getattr(metadata, key, None)]
    return [path for path in folders if not os.path.isdir(path)] + [path for path in files if not os.path.isfile(path)]


def check_on_disk(name: str, *, run: Runner | None = map, partial: bool = False) -> Iterator[Finding]:
    """Everything that can be said about a registered dataset, problem or not.

    Args:
        run: opens label files (see :data:`ovseg_d2.data.label_files.Runner`); None: they are not opened.
        partial: fewer images than the public dataset has are no problem.

    Raises:
        ValueError: no dataset has this name.
    """
    before_run.require_registered(name)
    metadata = MetadataCatalog.get(name)
    vocabulary = vocabulary_from_metadata(metadata)
    things = sum(vocabulary.is_thing)
    yield Finding("classes", f"{len(vocabulary)}" + (f", {things} of them things" if things else ""), False)
    absent = set(missing_places(name))
    hint = getattr(metadata, "prepare_hint", "see datasets/README.md")
    for kinds, check in ((_FOLDERS, _folder), (_ANNOTATIONS, _annotations)):
        for key, what in kinds.items():
            path = getattr(metadata, key, None)
            if path:
                missing = Finding(what, f"{path} does not exist ({hint})", True)
                yield missing if path in absent else check(what, path)
    try:
        records = before_run.load_dataset_dicts(name, filter_empty=False)
    except (ValueError, OSError) as error:
        yield Finding("dataset", str(error), True)
        return
    yield _count(records, getattr(metadata, "num_images", None), partial)
    checks: list[Callable[[], None]] = [
        *(lambda key=key: before_run.check_files(name, records, key) for key in _FILE_KEYS),
        lambda: before_run.check_every_label_has_an_image(name, records),
        lambda: before_run.check_categories(name, records),
    ]
    problems = [*_errors(checks), *([] if run is None else _labels(metadata, records, run))]
    for problem in problems:
        yield Finding("dataset", problem, True)
    if run is not None and not problems:
        yield Finding("files", "sizes and labels are right", False)


def _folder(what: str, path: str) -> Finding:
    return Finding(what, f"{path} ({len(os.listdir(path)):,} entries)", False)


def _annotations(what: str, path: str) -> Finding:
    return Finding(what, f"{path} ({os.path.getsize(path) / 1e6:,.1f} MB)", False)


def _count(records: Sequence[dict[str, Any]], expected: int | None, partial: bool) -> Finding:
    if expected is None or len(records) == expected:
        return Finding("dataset", f"{len(records):,} images", False)
    return Finding("dataset", f"{len(records):,} images, the public dataset has {expected:,}", not partial)


def _errors(checks: Sequence[Callable[[], None]]) -> Iterator[str]:
    for check in checks:
        try:
            check()
        except (ValueError, OSError) as error:
            yield str(error)


def _labels(metadata: Any, records: Sequence[dict[str, Any]], run: Runner) -> list[str]:
    """Problems of all label files that are there, and of images of another size than the annotations say."""
    return [
        *label_problems([file for record in records for file in _label_files(metadata, record)], run),
        *_wrong_sizes(records, run),
    ]


def _label_files(metadata: Any, record: dict[str, Any]) -> Iterator[LabelFile]:
    image = record["file_name"] if os.path.isfile(record["file_name"]) else None
    path = record.get("pan_seg_file_name")
    if path is not None and os.path.isfile(path):
        ids = (0, *(segment["id"] for segment in record["segments_info"]))
        yield LabelFile(path, image, ids, None, panoptic=True)
    path = record.get("sem_seg_file_name")
    if path is not None and os.path.isfile(path):
        num_labels = getattr(metadata, "semantic_num_labels", None) or len(vocabulary_from_metadata(metadata))
        yield LabelFile(path, image, range(num_labels), getattr(metadata, "ignore_label", None))


def _wrong_sizes(records: Sequence[dict[str, Any]], run: Runner) -> list[str]:
    sized = [record for record in records if annotated_size(record) and os.path.isfile(record["file_name"])]
    sizes = run(_safe_size, [record["file_name"] for record in sized])
    wrong = [
        f"{os.path.basename(record['file_name'])} ({found})"
        for record, found in zip(sized, sizes, strict=True)
        if found != annotated_size(record)
    ]
    if not wrong:
        return []
    return [f"{len(wrong)} of {len(sized)} images have another size than their annotation: {', '.join(wrong[:3])}"]


def _safe_size(path: str) -> tuple[int, int] | None:
    try:
        return image_size(path)
    except (OSError, ValueError):
        return None
