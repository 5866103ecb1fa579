"""SAM's network and its weights, from ``transformers``, which is not imported before it is needed."""

from __future__ import annotations

from typing import Any

from torch import nn

from ovseg_d2.modeling.layers.hub_model import check_model_folder, load_hub_weights, require_transformers

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
    require_transformers("MODEL.OVSEG.PROPOSALS.NAME is 'SAMProposals'", "sam")
    from transformers import SamConfig, SamModel, SamVisionConfig

    if name in PUBLIC:
        return SamModel(SamConfig(vision_config=SamVisionConfig(**PUBLIC[name])))
    check_model_folder(name, key=_KEY, kind="sam", public=PUBLIC)
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
    load_hub_weights(sam, name, key=_KEY)
    return f"{_KEY}: SAM's weights are those of {name}"
