"""Where the weights of a CLIP model lie: a file, a tag of open_clip, or the model zoo."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import open_clip
from open_clip import pretrained as open_clip_pretrained
from open_clip.constants import HF_WEIGHTS_NAME
from open_clip.factory import _find_checkpoint_in_dir, parse_model_name
from torch import Tensor

from ovseg_d2.checkpoint.io import PICKLE_SUFFIXES, TORCH_SUFFIXES, read_state_dict
from ovseg_d2.modeling.clip.architectures import ZOO, builtin_name, model_config, nearest, schema_of, zoo_names
from ovseg_d2.modeling.clip.openai import is_torchscript, read_torchscript

KEY = "MODEL.OVSEG.CLIP.PRETRAINED"
ZOO_TAG = "ovshapes"
#: For names that say themselves where their weights lie (``local-dir:``, ``hf-hub:``).
DEFAULT_TAG = "default"
_SUFFIXES = (*TORCH_SUFFIXES, *PICKLE_SUFFIXES, ".safetensors", ".npz")


def find_weights(name: str, pretrained: str) -> Path:
    """The file with the weights ``pretrained`` of the model ``name``, fetched by open_clip if it is not there yet.

    Raises:
        ValueError: no such tag or file, weights that need another model, or a file that cannot be fetched.
    """
    known: list[str] = []
    if name in zoo_names():
        known = [ZOO_TAG]
        if pretrained == ZOO_TAG:
            return _zoo_file(name)
    elif schema_of(name):
        known = [DEFAULT_TAG]
        if pretrained == DEFAULT_TAG:
            return _default_file(name)
    elif builtin_name(name):
        known = open_clip_pretrained.list_pretrained_tags_by_model(builtin_name(name))
        tag = open_clip_pretrained.get_pretrained_cfg(builtin_name(name), pretrained)
        if tag:
            _check_activation(name, f"the tag {pretrained!r}", tag.get("quick_gelu", False))
            return _fetched(tag, f"the weights {pretrained!r} of {name}")
    path = Path(pretrained).expanduser()
    if path.is_file():
        return path
    if os.sep in pretrained or path.suffix in _SUFFIXES:
        raise ValueError(f"{KEY}: the file {pretrained} does not exist")
    tags = ", ".join(nearest(pretrained, known, 12)) or "none"
    raise ValueError(f"{KEY}: {pretrained!r} is no file and no weights of {name}; nearest tags are {tags}")


def read_weights(path: Path, name: str, cache_dir: Path | None = None) -> dict[str, Tensor]:
    """The tensors of a weights file for the model ``name``; ``cache_dir`` is where OpenAI's archives are kept, turned
    into safetensors.

    Raises:
        ValueError: the file cannot be read, or needs another activation than the model has.
    """
    if not is_torchscript(path):
        return read_state_dict(path)
    _check_activation(name, f"OpenAI's archive {path}", True)
    return read_torchscript(path, cache_dir or default_cache_dir())


def default_cache_dir() -> Path:
    """Where what is derived from downloads is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ovseg_d2"


def _zoo_file(name: str) -> Path:
    path = ZOO / f"{name}.safetensors"
    if not path.is_file():
        raise ValueError(f"{KEY}: {path} does not exist; tools/pretrain_tiny_clip.py --name {name} makes it")
    sums = ZOO / "SHA256SUMS"
    lines = sums.read_text().splitlines() if sums.is_file() else []
    expected = {file: digest for digest, file in (line.split() for line in lines)}.get(path.name)
    if expected and hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise ValueError(f"{KEY}: {path} is damaged: its SHA-256 is not the one in {sums.name}")
    return path


def _default_file(name: str) -> Path:
    schema, place = parse_model_name(name)
    if schema == "local-dir":
        found = _find_checkpoint_in_dir(Path(place))
        if found is None:
            raise ValueError(f"{KEY}: no .safetensors, .bin or .pth file in the folder {place}")
        return Path(found)
    return _fetched({"hf_hub": f"{place}/"}, f"the weights of {name}")


def _fetched(tag: dict[str, Any], what: str) -> Path:
    try:
        return Path(open_clip.pretrained.download_pretrained(tag))
    except Exception as error:  # whatever the network, the server or the disk did
        if tag.get("hf_hub"):
            repository, file = os.path.split(tag["hf_hub"])
            source = f"{file or HF_WEIGHTS_NAME} of the Hugging Face repository {repository}"
        else:
            source = tag["url"]
        raise ValueError(
            f"{KEY}: {what} are not cached and could not be fetched ({type(error).__name__}); fetch {source} where "
            f"there is a network, put the file anywhere, and set {KEY} to its path"
        ) from error


def _check_activation(name: str, weights: str, quick_gelu: bool) -> None:
    """Weights that were trained with OpenAI's QuickGELU give bad features with GELU, and say nothing about it."""
    if model_config(name).get("quick_gelu", False) == quick_gelu:
        return
    other = f"{name}-quickgelu" if quick_gelu else name.removesuffix("-quickgelu")
    hint = f"set MODEL.OVSEG.CLIP.NAME {other}" if builtin_name(other) else f'"quick_gelu": {str(quick_gelu).lower()}'
    raise ValueError(
        f"MODEL.OVSEG.CLIP.NAME: {weights} needs a model {'with' if quick_gelu else 'without'} QuickGELU, which {name} "
        f"is not; {hint}"
    )
