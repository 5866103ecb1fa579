"""The class tables of the public datasets, ``class_names/*.json``, and the texts of their open-vocabulary views."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

_SYNONYMS = "synonyms"


def class_table(name: str) -> list[dict[str, Any]]:
    """The classes of ``class_names/<name>.json`` in their order: a list of {id, name, ...}.

    ``id`` is the class in the dataset's own files; some tables also have ``isthing``, ``color`` (RGB) or
    ``image_count`` (training images with the class). Where a table is from stands in the file, too: ``source``.

    Raises:
        ValueError: there is no such table.
    """
    files = (file.name for file in _folder().iterdir())
    known = sorted({file.removesuffix(".json") for file in files if file.endswith(".json")} - {_SYNONYMS})
    if name not in known:
        raise ValueError(f"class table {name!r} is unknown; expected one of {', '.join(known)}")
    return _read(name)["classes"]


def class_names(name: str) -> tuple[str, ...]:
    """The names of a class table, in its order."""
    return tuple(category["name"] for category in class_table(name))


def open_vocabulary_texts(names: Sequence[str]) -> list[list[str]]:
    """For each of K class names the texts that an image-text model should read for it.

    Names are put into plain words ("wall-brick" is "brick wall"), lists in them are taken apart ("road, route"), and
    synonyms of ``class_names/synonyms.json`` follow, unless they are another class's own words. Both are this
    project's: numbers published with other lists need those lists (``DATASETS.CLASS_TEXTS``).
    """
    content = _read(_SYNONYMS)
    own = [[text.strip() for text in content["plain_words"].get(name, name).split(",")] for name in names]
    claimed = {text for texts in own for text in texts}
    more = [[extra for text in texts for extra in content["synonyms"].get(text, ())] for texts in own]
    return [
        list(dict.fromkeys([*texts, *(text for text in extras if text not in claimed)]))
        for texts, extras in zip(own, more, strict=True)
    ]


def _folder() -> Any:
    return resources.files(__package__) / "class_names"


def _read(name: str) -> dict[str, Any]:
    return json.loads((_folder() / f"{name}.json").read_text(encoding="utf-8"))
