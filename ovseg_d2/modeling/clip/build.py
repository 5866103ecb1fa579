"""CLIP models by name: the only file that makes open_clip's models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import open_clip
from detectron2.config import CfgNode
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from torch import Tensor, nn

from ovseg_d2.modeling.clip import architectures
from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.clip.convnext import ClipConvNeXt
from ovseg_d2.modeling.clip.eva import ClipEva
from ovseg_d2.modeling.clip.image_encoder import ClipImageEncoder
from ovseg_d2.modeling.clip.resnet import ClipResNet
from ovseg_d2.modeling.clip.state_dict import load_clip_state_dict, load_image_state_dict
from ovseg_d2.modeling.clip.text_encoder import ClipTextEncoder
from ovseg_d2.modeling.clip.trainable import apply_policy
from ovseg_d2.modeling.clip.vit import ClipViT
from ovseg_d2.modeling.clip.weights import find_weights, read_weights


def build_clip(
    name: str,
    *,
    visual_kwargs: Mapping[str, Any] | None = None,
    with_visual: bool = True,
    with_text: bool = True,
) -> Clip:
    """A CLIP with random weights; reads no weights and works under ``torch.device("meta")``.

    Args:
        name: see :func:`architectures.model_config`.
        visual_kwargs: options of the image encoder that the architecture gets.
        with_visual, with_text: False for a model without image or text tower.

    Raises:
        ValueError: an unknown name, a broken configuration, or a tower of a kind that is not supported.
    """
    model = _open_clip_model(name)
    return Clip(
        visual=image_encoder(model.visual, name, **(visual_kwargs or {})) if with_visual else None,
        text=ClipTextEncoder.from_open_clip(model) if with_text else None,
        logit_scale=model.logit_scale,
    )


def build_clip_from_config(cfg: CfgNode, **visual_kwargs: Any) -> Clip:
    """The CLIP that ``MODEL.OVSEG.CLIP`` names.

    Of the image tower what ``TRAINABLE`` says is trained; text tower and scale are frozen. A method that trains them
    says so afterwards.

    Args:
        visual_kwargs: the method's options of the image encoder.
    """
    options = cfg.MODEL.OVSEG.CLIP
    clip = build_clip(options.NAME, visual_kwargs={"use_checkpoint": options.USE_CHECKPOINT, **visual_kwargs})
    apply_policy(clip.visual, options.TRAINABLE)
    clip.text.requires_grad_(False)
    clip.logit_scale.requires_grad_(False)
    return clip


def clip_tokenizer(name: str) -> Callable[[list[str]], Tensor]:
    """The tokenizer of a model: texts -> (B, L) int64, L the tower's context length.

    Raises:
        ValueError: an unknown name.
    """
    text = architectures.model_config(name)["text_cfg"]
    schema = architectures.schema_of(name)
    if schema or architectures.builtin_name(name):
        return open_clip.get_tokenizer(name if schema else architectures.builtin_name(name))
    options = dict(text.get("tokenizer_kwargs", {}))
    if not text["vocab_size"]:
        options["bpe_path"] = str(architectures.ZOO_BPE)
    return open_clip.SimpleTokenizer(context_length=text.get("context_length", 77), **options)


def load_clip_pretrained(
    clip: Clip,
    name: str,
    pretrained: str,
    *,
    convert: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> str:
    """Load the weights of both towers, or of the one that ``clip`` has.

    Args:
        name: the model's, as for :func:`build_clip`.
        pretrained: a tag of open_clip, "ovshapes" for the models of the package, "default" for the weights that lie
            with a ``local-dir:`` or ``hf-hub:`` model, or a file (safetensors, a state dict, or OpenAI's archive).
        convert: takes CLIP out of what a file holds.

    Returns:
        A line for the log.

    Raises:
        ValueError: no such tag or file, it cannot be fetched or read, or it belongs to another architecture.
    """
    path = find_weights(name, pretrained)
    weights = read_weights(path, name)
    count = load_clip_state_dict(clip, weights if convert is None else convert(weights), str(path))
    return f"CLIP {name}: {count} tensors of {pretrained!r} from {path}"


def load_image_pretrained(encoder: ClipImageEncoder, name: str, pretrained: str) -> str:
    """Load the weights of an image tower that stands alone; arguments, result and errors as above."""
    path = find_weights(name, pretrained)
    count = load_image_state_dict(encoder, read_weights(path, name), str(path))
    return f"image tower of CLIP {name}: {count} tensors of {pretrained!r} from {path}"


def image_encoder(tower: nn.Module, name: str = "", **options: Any) -> ClipImageEncoder:
    """Wrap an open_clip image tower in the encoder for its kind.

    Raises:
        ValueError: there is none.
    """
    trunk = tower.trunk if isinstance(tower, TimmModel) else tower
    encoders = {ModifiedResNet: ClipResNet, ConvNeXt: ClipConvNeXt, VisionTransformer: ClipViT, Eva: ClipEva}
    for kind, encoder in encoders.items():
        if isinstance(trunk, kind):
            return encoder(tower, **options)
    raise ValueError(
        f"{architectures.KEY}: the image tower of {name} is {type(trunk).__module__}.{type(trunk).__name__}; supported "
        "are open_clip's VisionTransformer and ModifiedResNet, and timm's ConvNeXt and Eva"
    )


def _open_clip_model(name: str) -> nn.Module:
    config = architectures.model_config(name)
    problem = None
    if "multimodal_cfg" in config:
        problem = "has a text decoder (CoCa)"
    elif config["text_cfg"].get("hf_model_name"):
        problem = f"has a text tower of Hugging Face ({config['text_cfg']['hf_model_name']})"
    if problem:
        raise ValueError(f"{architectures.KEY}: {name} {problem}, which is not supported")

    if not config["text_cfg"].get("vocab_size", True):
        config["text_cfg"]["vocab_size"] = clip_tokenizer(name).vocab_size
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    custom_text = config.pop("custom_text", False)
    try:
        model = (CustomTextCLIP if custom_text else CLIP)(**config)
    except TypeError as error:
        raise ValueError(f"{architectures.KEY}: the configuration of {name} is wrong: {error}") from error
    _apply_image_size(model.visual)
    return model


def _apply_image_size(tower: nn.Module) -> None:
    """timm makes its position table for the size in a model's name, whatever the configuration says."""
    if isinstance(tower, TimmModel) and isinstance(tower.trunk, Eva):
        if tuple(tower.trunk.patch_embed.img_size) != tuple(tower.image_size):
            tower.set_input_size(tower.image_size)
