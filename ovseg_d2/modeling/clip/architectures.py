"""Names of CLIP architectures -> open_clip's configurations."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import parse_model_name

from ovseg_d2.model_zoo import FOLDER as ZOO

KEY = "MODEL.OVSEG.CLIP.NAME"
ZOO_BPE = ZOO / "ovshapes_bpe.txt.gz"


def zoo_names() -> list[str]:
    """Names of the tiny models that ship with the package."""
    return sorted(path.stem for path in ZOO.glob("*.json"))


def builtin_name(name: str) -> str | None:
    """The name of ``name`` in open_clip's own list; None if it is not there."""
    name = name.replace("/", "-")
    return name if name in open_clip.list_models() else None


def schema_of(name: str) -> str | None:
    """``local-dir`` or ``hf-hub`` if the name begins so, with a colon; None otherwise.

    Raises:
        ValueError: nothing follows.
    """
    try:
        return parse_model_name(name)[0]
    except ValueError as error:
        raise ValueError(f"{KEY}: {name!r} names nothing after its colon") from error


def model_config(name: str) -> dict[str, Any]:
    """The configuration in open_clip's form: ``embed_dim``, ``vision_cfg``, ``text_cfg`` and so on.

    Args:
        name: of the model zoo, of open_clip (also ``local-dir:FOLDER`` and ``hf-hub:REPOSITORY``), or the path of a
            ``.json`` file.

    Raises:
        ValueError: there is no such model, or its configuration cannot be read.
    """
    if name in zoo_names():
        return _read_config(ZOO / f"{name}.json")
    if name.endswith(".json"):
        return _read_config(Path(name))
    schema = schema_of(name)
    if schema == "local-dir":
        return _read_config(Path(parse_model_name(name)[1]) / "open_clip_config.json")
    if schema == "hf-hub":
        repository = parse_model_name(name)[1]
        try:
            return _checked(open_clip.factory._get_hf_config(repository), name)
        except OSError as error:
            raise ValueError(
                f"{KEY}: open_clip_config.json of the Hugging Face repository {repository} is not cached and could "
                "not be fetched; put it with the weights into a folder and use local-dir:FOLDER"
            ) from error
    if builtin_name(name) is None:
        known = [*zoo_names(), *open_clip.list_models()]
        raise ValueError(
            f"{KEY}: no CLIP model {name!r}; nearest are {', '.join(nearest(name, known))} (or the path of a .json "
            "file, local-dir:FOLDER, hf-hub:REPOSITORY)"
        )
    return deepcopy(open_clip.get_model_config(builtin_name(name)))


def tower_kind(name: str) -> str:
    """Of the image tower that a name stands for: "resnet" (CLIP's own), "convnext", "eva" or "vit".

    Raises:
        ValueError: see :func:`model_config`.
    """
    vision = model_config(name)["vision_cfg"]
    trunk = vision.get("timm_model_name", "")
    if isinstance(vision.get("layers"), list | tuple):
        return "resnet"
    return next((kind for kind in ("convnext", "eva") if kind in trunk), "vit")


def nearest(name: str, known: Iterable[str], count: int = 6) -> list[str]:
    """The known names that look most like ``name``."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    return [by_lower[key] for key in difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.0)]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{KEY}: the file {path} does not exist")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{KEY}: {path} is not JSON: {error}") from error
    return _checked(config, str(path))


def _checked(config: Any, source: str) -> dict[str, Any]:
    config = config.get("model_cfg", config) if isinstance(config, dict) else {}
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise ValueError(f"{KEY}: {source} is no configuration of open_clip: {', '.join(missing)} missing")
    return config
