"""SAM's network and its weights, from ``transformers``: the only file that imports it, and not before it is needed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

_KEY = "MODEL.OVSEG.PROPOSALS.SAM.NAME"
#: The public models, by what their image encoders differ in from the smallest one (arXiv 2304.02643, appendix A).
PUBLIC: dict[str, dict[str, Any]] = {
    "facebook/sam-vit-base": {},
    "facebook/sam-vit-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "global_attn_indexes": [5, 11, 17, 23],
    },
    "facebook/sam-vit-huge": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "global_attn_indexes": [7, 15, 23, 31],
    },
}


def build_sam(name: str) -> nn.Module:
    """A ``SamModel`` with random weights; nothing is fetched.

    Args:
        name: of a public model, or a folder with a ``config.json``.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds another model, or transformers is not installed.
    """
    _require_transformers()
    from transformers import SamConfig, SamModel, SamVisionConfig

    if name in PUBLIC:
        return SamModel(SamConfig(vision_config=SamVisionConfig(**PUBLIC[name])))
    path = Path(name) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{_KEY}: {path} does not exist; expected a folder with it, or one of {', '.join(PUBLIC)}"
        )
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{_KEY}: {path} is not a JSON object: {error}") from error
    if kind != "sam":
        raise ValueError(f"{_KEY}: {path} is of a model of type {kind!r}; expected 'sam'")
    return SamModel(SamConfig.from_pretrained(name, local_files_only=True))


def build_sam_processor(image_size: int) -> Any:
    """The ``SamImageProcessor`` for a network that takes squares of ``image_size`` pixels."""
    from transformers import SamImageProcessor

    return SamImageProcessor(size={"longest_edge": image_size}, pad_size={"height": image_size, "width": image_size})


def load_sam_pretrained(sam: nn.Module, name: str) -> str:
    """Fill a model of :func:`build_sam` with the weights of ``name``, from a folder or else from the Hugging Face hub.

    Returns:
        A line for the log.

    Raises:
        ValueError: there are no weights, they cannot be fetched, or they are of another architecture.
    """
    from transformers import SamModel

    try:
        found, info = SamModel.from_pretrained(name, config=sam.config, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{_KEY}: cannot read the weights of {name}: {reason}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{_KEY}: the weights of {name} lack {len(missing)} tensors of the model, {missing[0]} first")
    sam.load_state_dict(found.state_dict())
    return f"{_KEY}: SAM's weights are those of {name}"


def _require_transformers() -> None:
    if find_spec("transformers") is None:
        raise ValueError(
            "MODEL.OVSEG.PROPOSALS.NAME is 'SAMProposals', which needs transformers: pip install 'ovseg_d2[sam]'"
        )
