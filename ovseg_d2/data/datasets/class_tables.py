"""The class tables of the public datasets, ``class_names/*.json``."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def class_table(name: str) -> list[dict[str, Any]]:
    """The classes of ``class_names/<name>.json`` in their order: a list of {id, name, ...}.

    ``id`` is the class in the dataset's own files; some tables also have ``isthing``, ``color`` (RGB) or
    ``image_count`` (training images with the class).

    Raises:
        ValueError: there is no such table.
    """
    folder = resources.files(__package__) / "class_names"
    known = sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))
    if name not in known:
        raise ValueError(f"class table {name!r} is unknown; expected one of {', '.join(known)}")
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def class_names(name: str) -> tuple[str, ...]:
    """The names of a class table, in its order."""
    return tuple(category["name"] for category in class_table(name))
