"""Configuration from a YAML file and ``KEY VALUE`` pairs, with errors that name the key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY

from ovseg_d2.config import add_ovseg_config
from ovseg_d2.data.class_texts import attach_class_texts
from ovseg_d2.data.datasets import register_from_entries
from ovseg_d2.engine.lr_schedule import LR_SCHEDULERS
from ovseg_d2.engine.optimizer import CLIP_TYPES, OPTIMIZERS

# What the keys with a fixed set of values allow. A list-valued key may hold any of them.
CHOICES: dict[str, tuple[str, ...]] = {
    "INPUT.TARGETS": ("panoptic", "semantic", "instance"),
    "INPUT.PIPELINE": ("lsj", "crop", "resize"),
    "DATALOADER.ON_CORRUPT_IMAGE": ("skip", "raise"),
    "TEST.ON_CORRUPT_IMAGE": ("skip", "raise"),
    "MODEL.OVSEG.TEST.TASKS": ("semantic", "panoptic", "instance", "mask_accuracy"),
    "MODEL.OVSEG.TEST.ORACLE": ("", "iou"),
    "SOLVER.OPTIMIZER": OPTIMIZERS,
    "SOLVER.LR_SCHEDULER_NAME": LR_SCHEDULERS,
    "SOLVER.AMP.DTYPE": ("bfloat16", "float16"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": CLIP_TYPES,
}


def load_config(config_file: str | Path = "", opts: Sequence[str] = ()) -> CfgNode:
    """detectron2's defaults, ours, then a file and its ``_BASE_`` files, then ``opts`` (KEY VALUE KEY VALUE ...).

    The datasets that ``DATASETS.REGISTER`` describes are registered on the way.

    Raises:
        FileNotFoundError: the file, or one that it is based on, is not there.
        ValueError: one line that names an unknown key and the nearest known one, or a value that a key does not take.
    """
    cfg = get_cfg()
    add_ovseg_config(cfg)
    if config_file:
        _merge(cfg, _read_yaml(config_file), where=f" in {config_file}")
    _merge(cfg, _pairs(opts), where="")
    _check_choices(cfg)
    _check_crop(cfg)
    register_from_entries(cfg.DATASETS.REGISTER)
    attach_class_texts(cfg.DATASETS.CLASS_TEXTS)
    return cfg


def _read_yaml(config_file: str | Path) -> Mapping[str, Any]:
    if not Path(config_file).is_file():
        raise FileNotFoundError(f"config file {config_file} does not exist")
    try:
        # Without unsafe tags: a config file is data, too.
        content = CfgNode.load_yaml_with_base(str(config_file), allow_unsafe=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"config file {config_file} is based on {error.filename}, which does not exist"
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"config file {config_file} is no plain YAML: {' '.join(str(error).split())}") from error
    except TypeError as error:  # an empty file, or one that holds no keys
        raise ValueError(f"config file {config_file} holds no KEY: VALUE lines") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"config file {config_file} holds no KEY: VALUE lines")
    return content


def _pairs(opts: Sequence[str]) -> dict[str, Any]:
    """``KEY VALUE`` pairs as nested dicts."""
    options = [word for word in opts if word.startswith("--")]
    if options:
        raise ValueError(f"options stand before the KEY VALUE pairs, found {options[0]} among them")
    if len(opts) % 2:
        raise ValueError(f"expected KEY VALUE pairs after the options, found {len(opts)} words: {' '.join(opts)}")
    content: dict[str, Any] = {}
    for key, value in zip(opts[0::2], opts[1::2], strict=True):
        *path, last = key.split(".")
        node = content
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return content


def _merge(cfg: CfgNode, content: Mapping[str, Any], *, where: str) -> None:
    known = dict(_leaves(cfg))
    nodes = {key.rpartition(".")[0] for key in known}
    open_nodes = [f"{path}." for path, node in _nodes(cfg) if node.is_new_allowed()]
    for key, value in _leaves(content):
        if key in nodes:
            raise ValueError(f"config key {key}{where} is a section, it takes no value; found {value!r}")
        if key not in known and not any(key.startswith(path) for path in open_nodes):
            raise ValueError(f"unknown config key {key}{where}; the nearest known one is {_nearest(key, known)}")
        if isinstance(known.get(key), tuple | list) and isinstance(CfgNode._decode_cfg_value(value), str):
            raise ValueError(f"config key {key}{where} takes a list, found {value!r}; for one entry \"['{value}']\"")
    try:
        cfg.merge_from_other_cfg(CfgNode(_with_floats(content, cfg)))
    except ValueError as error:
        raise ValueError(f"{' '.join(str(error).split())}{where}") from error


def _with_floats(content: Mapping[str, Any], cfg: CfgNode) -> dict[str, Any]:
    """yacs takes no ``1`` where the default is ``1.0``; people write it all the same."""
    result: dict[str, Any] = {}
    for key, value in content.items():
        old = cfg.get(key)
        if isinstance(value, Mapping):
            value = _with_floats(value, old if isinstance(old, CfgNode) else CfgNode())
        elif isinstance(old, float):
            value = CfgNode._decode_cfg_value(value)
            value = float(value) if type(value) is int else value
        result[key] = value
    return result


def _nearest(key: str, known: Iterable[str]) -> str:
    """The known key that looks most like ``key``: by its last word first, then as a whole."""
    known = list(known)
    last = key.rpartition(".")[2]

    def likeness(other: str) -> tuple[float, float]:
        words = difflib.SequenceMatcher(None, last, other.rpartition(".")[2]).ratio()
        whole = difflib.SequenceMatcher(None, key, other).ratio()
        return words + whole, whole

    return max(known, key=likeness)


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nodes(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, CfgNode]]:
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield f"{prefix}{key}", value
            yield from _nodes(value, f"{prefix}{key}.")


def _check_crop(cfg: CfgNode) -> None:
    """A training crop must fill what images are padded to: else most of what the model learns from is padding."""
    crop, divisibility = cfg.INPUT.CROP, cfg.MODEL.OVSEG.SIZE_DIVISIBILITY
    if cfg.INPUT.PIPELINE == "lsj":
        key, sizes = "INPUT.IMAGE_SIZE", [cfg.INPUT.IMAGE_SIZE]
    elif cfg.INPUT.PIPELINE == "crop" and crop.ENABLED and crop.TYPE.startswith("absolute"):
        key, sizes = "INPUT.CROP.SIZE", list(crop.SIZE)
    else:
        return
    if 1 <= min(sizes) < divisibility:  # below 1 are detectron2's default fractions, in files that others complete
        raise ValueError(
            f"{key} is {sizes if len(sizes) > 1 else sizes[0]}, smaller than MODEL.OVSEG.SIZE_DIVISIBILITY, "
            f"{divisibility}, which images are padded to; expected at least as much"
        )


def _check_choices(cfg: CfgNode) -> None:
    values = dict(_leaves(cfg))
    for key, allowed in {**CHOICES, "MODEL.META_ARCHITECTURE": [name for name, _ in META_ARCH_REGISTRY]}.items():
        found = values[key]
        for value in found if isinstance(found, list | tuple) else [found]:
            if value not in allowed:
                raise ValueError(f"{key} is {value!r}, allowed are {', '.join(a or repr(a) for a in allowed)}")
