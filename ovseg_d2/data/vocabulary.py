"""Vocabularies from a dataset's metadata, from a string, and from a text or JSON file.

In strings and text files a class is written ``name``, or ``name, synonym, synonym``; a final ``:stuff`` or ``:thing``
says what it is, a thing by default. Its first name is the one that is shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ovseg_d2.structures import Vocabulary

# Datasets of instances alone: their classes are the things, whatever stuff_classes their metadata lists beside them.
_INSTANCE_EVALUATORS = ("coco", "lvis", "cityscapes_instance")
_FILE_SUFFIXES = (".txt", ".json")
# Keys of an object in a JSON file, and those of COCO's category lists that say nothing about a vocabulary.
_OBJECT_KEYS = ("name", "synonyms", "isthing")
_IGNORED_KEYS = ("id", "color", "supercategory")


def vocabulary_from_metadata(metadata: Any) -> Vocabulary:
    """All K classes of a registered dataset, in the order of their contiguous ids.

    Panoptic datasets list all classes as ``stuff_classes`` and mark the things by
    ``thing_dataset_id_to_contiguous_id``; instance datasets have ``thing_classes`` only. Two further attributes are
    optional: ``class_synonyms``, the texts of each class (default: its name), and ``class_is_seen``, the flags of a
    zero-shot split.

    Raises:
        ValueError: the metadata has no class names, or numbers things and stuffs separately (Panoptic-FPN style).
    """
    extras = {
        "synonyms": tuple(
            tuple(text.strip() for text in texts) for texts in getattr(metadata, "class_synonyms", None) or ()
        ),
        "is_seen": tuple(bool(seen) for seen in getattr(metadata, "class_is_seen", None) or ()),
    }
    only_things = getattr(metadata, "evaluator_type", None) in _INSTANCE_EVALUATORS
    if hasattr(metadata, "stuff_classes") and not only_things:
        # Blanks around a name ("window " in detectron2's ADE20K table) would reach the text tower.
        names = tuple(name.strip() for name in metadata.stuff_classes)
        things = set(getattr(metadata, "thing_dataset_id_to_contiguous_id", {}).values())
        thing_names = {name.strip() for name in getattr(metadata, "thing_classes", names)}
        if any(i >= len(names) or names[i] not in thing_names for i in things):
            raise ValueError(
                f"dataset {metadata.name!r} numbers things and stuffs separately; expected one list of all classes "
                "in stuff_classes (for COCO: coco_2017_*_panoptic_with_sem_seg)"
            )
        return Vocabulary(names=names, is_thing=tuple(i in things for i in range(len(names))), **extras)
    if hasattr(metadata, "thing_classes"):
        names = tuple(name.strip() for name in metadata.thing_classes)
        return Vocabulary(names=names, is_thing=(True,) * len(names), **extras)
    raise ValueError(f"dataset {getattr(metadata, 'name', '?')!r} is registered without stuff_classes or thing_classes")


def training_vocabulary(dataset_names: Sequence[str]) -> Vocabulary | None:
    """The classes that training counts in, those of the first of its datasets; None if there is none, or it is not
    registered with class names."""
    metadata = MetadataCatalog.get(dataset_names[0]) if dataset_names else None
    has_classes = hasattr(metadata, "thing_classes") or hasattr(metadata, "stuff_classes")
    return vocabulary_from_metadata(metadata) if has_classes else None


def vocabulary_from_string(text: str) -> Vocabulary:
    """Classes between commas, ``"red star, blue ring, grass:stuff"``; with a pipe anywhere, pipes separate classes and
    commas synonyms, ``"red star, scarlet star | grass, lawn:stuff"``.

    Raises:
        ValueError: no class, an empty or doubled name.
    """
    if not text.strip():
        raise ValueError("the vocabulary has no classes; expected at least one")
    entries = text.split("|") if "|" in text else text.split(",")
    return _vocabulary([(f"vocabulary {text!r}, class {i}", entry) for i, entry in enumerate(entries, start=1)])


def vocabulary_from_names(names: Sequence[str]) -> Vocabulary:
    """Classes of a list, ``["red star", "grass, lawn:stuff"]``.

    Raises:
        ValueError: no class, an empty or doubled name.
    """
    if not names:
        raise ValueError("the vocabulary has no classes; expected at least one")
    return _vocabulary([(f"vocabulary, class {i}", name) for i, name in enumerate(names, start=1)])


def vocabulary_from_file(path: str | Path) -> Vocabulary:
    """Classes of a file.

    A text file (``.txt``) has one class a line; ``#`` starts a comment. A JSON file (``.json``) has a list whose
    members are such lines, or objects ``{"name": "couch", "synonyms": ["sofa"], "isthing": true}`` of which the name
    alone is required and is itself one of the class's texts. COCO's lists of categories are of this form.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, not readable as UTF-8 or JSON, no class, an empty or doubled name.
    """
    path = Path(path)
    if path.suffix.lower() not in _FILE_SUFFIXES:
        raise ValueError(f"vocabulary {path}: unknown suffix {path.suffix!r}, allowed are {', '.join(_FILE_SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"vocabulary {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"vocabulary {path} is not a text in UTF-8 ({error.reason} at byte {error.start})") from error
    if path.suffix.lower() == ".txt":
        lines = ((i, line.partition("#")[0].strip()) for i, line in enumerate(text.splitlines(), start=1))
        entries: list[tuple[str, Any]] = [(f"vocabulary {path}, line {i}", line) for i, line in lines if line]
    else:
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"vocabulary {path} is not valid JSON: {error}") from error
        if not isinstance(content, list):
            raise ValueError(f"vocabulary {path} holds a {type(content).__name__}; expected a list of classes")
        entries = [(f"vocabulary {path}, entry {i}", entry) for i, entry in enumerate(content, start=1)]
    if not entries:
        raise ValueError(f"vocabulary {path} has no classes; expected at least one")
    return _vocabulary(entries)


def load_vocabulary(spec: str) -> Vocabulary:
    """A file (``.txt`` or ``.json``), a registered dataset's name, or else the classes themselves as in
    :func:`vocabulary_from_string`."""
    if spec.lower().endswith(_FILE_SUFFIXES):
        return vocabulary_from_file(spec)
    if spec in DatasetCatalog.list():
        return vocabulary_from_metadata(MetadataCatalog.get(spec))
    return vocabulary_from_string(spec)


def _vocabulary(entries: Sequence[tuple[str, Any]]) -> Vocabulary:
    """Classes from (place for errors, line or JSON object)."""
    places: dict[str, str] = {}
    classes = []
    for place, entry in entries:
        synonyms, is_thing = _parse_line(entry, place) if isinstance(entry, str) else _parse_object(entry, place)
        if synonyms[0] in places:
            raise ValueError(f"{place}: {synonyms[0]!r} is there already ({places[synonyms[0]]}); names must differ")
        places[synonyms[0]] = place
        classes.append((synonyms[0], is_thing, synonyms))
    names, is_thing, synonyms = zip(*classes, strict=True)
    return Vocabulary(names=names, is_thing=is_thing, synonyms=synonyms)


def _parse_line(line: str, place: str) -> tuple[tuple[str, ...], bool]:
    """``"grass, lawn:stuff"`` -> (("grass", "lawn"), False)."""
    marker = re.search(r":\s*(stuff|thing)\s*$", line, flags=re.IGNORECASE)
    names = line[: marker.start()] if marker else line
    return _texts(names.split(","), place), marker is None or marker[1].lower() == "thing"


def _parse_object(entry: Any, place: str) -> tuple[tuple[str, ...], bool]:
    """``{"name": "grass", "synonyms": ["lawn"], "isthing": 0}`` -> (("grass", "lawn"), False)."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is a {type(entry).__name__}; expected a name or an object with a name")
    unknown = sorted(entry.keys() - {*_OBJECT_KEYS, *_IGNORED_KEYS})
    if unknown:
        raise ValueError(f"{place} has the unknown key {unknown[0]!r}; allowed are {', '.join(_OBJECT_KEYS)}")
    name, synonyms, is_thing = entry.get("name"), entry.get("synonyms", []), entry.get("isthing", True)
    if not isinstance(name, str):
        raise ValueError(f"{place}: name is {name!r}; expected a text")
    if not isinstance(synonyms, list) or not all(isinstance(text, str) for text in synonyms):
        raise ValueError(f"{place}: synonyms is {synonyms!r}; expected a list of texts")
    if is_thing not in (True, False):
        raise ValueError(f"{place}: isthing is {is_thing!r}; expected true, false, 1 or 0")
    return _texts([name, *synonyms], place), bool(is_thing)


def _texts(texts: Sequence[str], place: str) -> tuple[str, ...]:
    """Each text once, without superfluous blanks."""
    cleaned = [" ".join(text.split()) for text in texts]
    if not all(cleaned):
        what = "empty name" if len(cleaned) == 1 else f"empty name among {', '.join(map(repr, cleaned))}"
        raise ValueError(f"{place}: {what}")
    return tuple(dict.fromkeys(cleaned))
