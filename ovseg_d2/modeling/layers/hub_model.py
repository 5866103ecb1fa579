"""Networks of ``transformers``, built without weights and filled afterwards; it is not imported before it is needed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from torch import nn


def require_transformers(choice: str, extra: str) -> None:
    """
    Args:
        choice: what of the config needs the library, for the message.
        extra: of this package, which brings it.

    Raises:
        ValueError: it is not installed.
    """
    if find_spec("transformers") is None:
        raise ValueError(f"{choice}, which needs transformers: pip install 'ovseg_d2[{extra}]'")


def check_model_folder(name: str, *, key: str, kind: str, public: Iterable[str]) -> None:
    """Refuse a folder that does not hold a model of a kind.

    Args:
        name: of the folder.
        key: of the config, for messages.
        kind: ``model_type`` in its ``config.json``.
        public: names that are allowed beside folders.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds another model.
    """
    path = Path(name) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{key}: {path} does not exist; expected a folder with it, or one of {', '.join(public)}"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{key}: {path} is not a JSON object: {error}") from error
    if found != kind:
        raise ValueError(f"{key}: {path} is of a model of type {found!r}; expected {kind!r}")


def load_hub_weights(model: nn.Module, name: str, *, key: str) -> None:
    """Fill a model with the weights of ``name``, from a folder or else from the Hugging Face hub.

    Args:
        model: of ``transformers``.
        key: of the config, for messages.

    Raises:
        ValueError: there are no weights, they cannot be fetched, or they are of another architecture.
    """
    try:
        found, info = type(model).from_pretrained(name, config=model.config, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{key}: cannot read the weights of {name}: {reason}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{key}: the weights of {name} lack {len(missing)} tensors of the model, {missing[0]} first")
    model.load_state_dict(found.state_dict())
