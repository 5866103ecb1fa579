"""Synonyms for the classes of registered datasets, from files (``DATASETS.CLASS_TEXTS``).

Open-vocabulary models are mostly compared with hand-made lists of synonyms ("person, child, girl, ..."), which decide
both what the text tower reads and which classes count as seen. The public projects' files of them can be used as they
are: a class a line, ``number: name, synonym, ...``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ovseg_d2.data.vocabulary import vocabulary_from_file, vocabulary_from_metadata

_NUMBERED = re.compile(r"^\s*\d+\s*:(.*)$")
#: The line that stands for "no class" in front of some public lists.
_NO_CLASS = "invalid_class_id"


def attach_class_texts(entries: Sequence[Sequence[str]]) -> None:
    """Give datasets their synonyms, in their metadata.

    Args:
        entries: pairs [dataset, file], the file with a line (or a JSON object) a class in the dataset's order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no pair, a dataset that is not registered, or a file of another number of classes.
    """
    for entry in entries:
        if len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise ValueError(f"DATASETS.CLASS_TEXTS: {entry} is not a pair [dataset, file]")
        name, path = entry
        if name not in DatasetCatalog.list():
            raise ValueError(f"DATASETS.CLASS_TEXTS: {name!r} is no registered dataset")
        metadata = MetadataCatalog.get(name)
        texts = read_class_texts(path)
        expected = len(vocabulary_from_metadata(_without_texts(metadata)))
        if len(texts) != expected:
            raise ValueError(f"DATASETS.CLASS_TEXTS: {path} has {len(texts)} classes, but {name} has {expected}")
        # Metadata refuses to change a value; a configuration can be set up more than once in a process.
        if hasattr(metadata, "class_synonyms"):
            del metadata.class_synonyms
        metadata.class_synonyms = texts


def read_class_texts(path: str | Path) -> list[list[str]]:
    """The texts of each class of a file: numbered lines, or what :func:`vocabulary_from_file` reads."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"DATASETS.CLASS_TEXTS: {path} does not exist")
    lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    numbered = [_NUMBERED.match(line) for line in lines]
    if not lines or not all(numbered):
        return [list(texts) for texts in vocabulary_from_file(path).synonyms]
    texts = [[text.strip() for text in match[1].split(",") if text.strip()] for match in numbered]
    if texts[0] == [_NO_CLASS]:
        texts = texts[1:]
    empty = [i for i, names in enumerate(texts) if not names]
    if empty:
        raise ValueError(f"DATASETS.CLASS_TEXTS: class {empty[0]} of {path} has no name")
    return texts


def _without_texts(metadata: Any) -> Any:
    """The metadata as it was before, whatever texts it has by now."""
    bare = type("Metadata", (), {})()
    bare.__dict__.update({key: value for key, value in metadata.as_dict().items() if key != "class_synonyms"})
    return bare
