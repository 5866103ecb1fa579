"""Datasets that a configuration file describes (``DATASETS.REGISTER``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.data import DatasetCatalog

from ovseg_d2.data.datasets.coco_format import (
    dataset_root,
    register_coco_instances,
    register_coco_panoptic,
    register_semantic_folder,
)
from ovseg_d2.data.datasets.zero_shot_splits import register_zero_shot

_KINDS: dict[str, Callable[..., None]] = {
    "panoptic": register_coco_panoptic,
    "instance": register_coco_instances,
    "semantic": register_semantic_folder,
    "zero_shot": register_zero_shot,
}


def register_from_entries(entries: Sequence[dict[str, Any]]) -> None:
    """Register datasets described in a configuration file (``DATASETS.REGISTER``), one mapping a dataset.

    An entry has ``kind`` (panoptic, instance, semantic or zero_shot) and the arguments of that kind's ``register_*``
    function; relative paths start at DETECTRON2_DATASETS. Names that are registered already are left alone, so that a
    configuration can be set up more than once in a process.
    """
    for index, entry in enumerate(entries):
        arguments = dict(entry)
        kind = arguments.pop("kind", None)
        if kind not in _KINDS:
            raise ValueError(f"DATASETS.REGISTER[{index}]: kind is {kind!r}; expected one of {', '.join(_KINDS)}")
        for key, value in arguments.items():
            if key.endswith(("_root", "_json")) and value is not None:
                arguments[key] = os.path.join(dataset_root(), os.path.expanduser(value))
        if arguments.get("name") in DatasetCatalog.list():
            continue
        try:
            _KINDS[kind](**arguments)
        except TypeError as error:  # a missing or unknown argument: the message names it
            raise ValueError(f"DATASETS.REGISTER[{index}] ({kind}): {error}") from None
