"""open_clip's state dicts -> those of :class:`Clip`, and how they are loaded."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from torch import Tensor

from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.clip.image_encoder import ClipImageEncoder
from ovseg_d2.modeling.clip.trainable import pack_split_weights, split_packed_weights
from ovseg_d2.modeling.layers.position_embedding import resize_position_embedding

logger = logging.getLogger(__name__)

_VISUAL = "visual.tower."
_POSITIONS = ("tower.positional_embedding", "tower.trunk.pos_embed")
#: What open_clip's CLIP keeps of its text tower beside the image tower.
_TEXT_PARTS = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection", "cls_emb")
#: Facts about an OpenAI model that lie among its weights.
OPENAI_ENTRIES = ("input_resolution", "context_length", "vocab_size")
# A bias that SigLIP adds to all classes alike, and tables that old files hold though they are computed.
_IGNORED = (*OPENAI_ENTRIES, "logit_bias", "attn_mask", "text.attn_mask")


def clip_state_dict_from_open_clip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an open_clip ``CLIP`` or ``CustomTextCLIP`` (EVA) to those of :class:`Clip`.

    ``visual.X`` becomes ``visual.tower.X``; the text tower's parts, at the top in ``CLIP`` and under ``text.`` in
    ``CustomTextCLIP``, stand under ``text.``. Names that are neither stay as they are.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        if name in _IGNORED:
            continue
        if name.startswith("visual.") and not name.startswith(_VISUAL):
            name = _VISUAL + name.removeprefix("visual.")
        elif name.startswith(_TEXT_PARTS):
            name = f"text.{name}"
        renamed[name] = tensor
    return renamed


def pretrained_names(clip: Clip) -> list[str]:
    """Names in ``clip`` of what its weights give: both towers and the scale, not what a method adds beside them."""
    return [name for name in clip.state_dict() if name.startswith((_VISUAL, "text.")) or name == "logit_scale"]


def fitted_weights(
    state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor], *, pos_mode: str = "bicubic"
) -> dict[str, Tensor]:
    """The weights of CLIP's towers in the form that a model has them: input projections of attention packed or split,
    and the position table of a ViT on its grid (the log tells).

    Args:
        state_dict: of a checkpoint; what is not CLIP's stays as it is.
        own: of the model, names alike.
        pos_mode: how the table is resized; bicubic in open_clip.
    """
    weights = pack_split_weights(split_packed_weights(state_dict, own), own)
    for name, table in weights.items():
        if not name.endswith(_POSITIONS) or name not in own or table.shape == own[name].shape:
            continue
        found, wanted = (math.isqrt(t.shape[-2] - 1) for t in (table, own[name]))
        if (found**2 + 1, wanted**2 + 1, table.shape[-1]) == (table.shape[-2], *own[name].shape[-2:]):
            weights[name] = resize_position_embedding(table, (wanted, wanted), mode=pos_mode, align_corners=False)
            logger.warning(
                f"{name}: {found} x {found} positions in the file, resized to the model's {wanted} x {wanted}"
            )
    return weights


def load_clip_state_dict(clip: Clip, state_dict: Mapping[str, Tensor], source: str) -> int:
    """Load all of both towers, or refuse; what a method adds beside them keeps its values.

    Args:
        state_dict: with open_clip's names or :class:`Clip`'s.
        source: what messages call the weights.

    Returns:
        The number of tensors.

    Raises:
        ValueError: a tensor of another shape, missing or unknown.
    """
    weights = clip_state_dict_from_open_clip(state_dict)
    for tower, prefix in ((clip.text, "text."), (clip.visual, _VISUAL)):
        if tower is None:
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
    own = clip.state_dict()
    own = {name: own[name] for name in pretrained_names(clip)}
    if "logit_scale" in weights and weights["logit_scale"].numel() == 1:
        weights["logit_scale"] = weights["logit_scale"].reshape(own["logit_scale"].shape)
    weights = fitted_weights(weights, own, pos_mode=getattr(clip.visual, "pos_mode", "bicubic"))

    _require_equal(own, weights, source)
    clip.load_state_dict(weights, strict=False)
    return len(weights)


def load_image_state_dict(encoder: ClipImageEncoder, state_dict: Mapping[str, Tensor], source: str) -> int:
    """Load all of an image tower, or refuse.

    Of the file are left alone the text tower, an attention pool where the tower has none, and counters of batches where
    its batch norms have none. A position table of a ViT with another grid is resized as the encoder does it.

    Args:
        state_dict: with open_clip's names or :class:`Clip`'s.
        source: what messages call the weights.

    Returns:
        The number of tensors.

    Raises:
        ValueError: a tensor of another shape, missing or unknown.
    """
    own = {f"visual.{name}": tensor for name, tensor in encoder.state_dict().items() if name.startswith("tower.")}
    left_out = () if getattr(encoder.tower, "attnpool", encoder) is not None else (f"{_VISUAL}attnpool.",)
    weights = {
        name: tensor
        for name, tensor in clip_state_dict_from_open_clip(state_dict).items()
        if name.startswith(_VISUAL)
        and not name.startswith(left_out)
        and not (name.endswith("num_batches_tracked") and name not in own)
    }
    table = f"{_VISUAL}positional_embedding"
    if table in own and table in weights:
        side = math.isqrt(len(own[table]) - 1)
        weights[table] = resize_position_embedding(
            weights[table], (side, side), mode=encoder.pos_mode, align_corners=encoder.pos_align_corners
        )
    weights = fitted_weights(weights, own)
    _require_equal(own, weights, source)
    encoder.load_state_dict({name.removeprefix("visual."): t for name, t in weights.items()}, strict=False)
    return len(weights)


def _require_equal(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    """Raise a one-line ``ValueError`` unless both have the same names and shapes."""
    problems = []
    unequal = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    if unequal:
        name = unequal[0]
        problems.append(
            f"{len(unequal)} tensors of another shape, first {_open_clip_name(name)}: {tuple(weights[name].shape)} in "
            f"the file, {tuple(own[name].shape)} in the model"
        )
    for kind, names in (
        ("missing", [name for name in own if name not in weights]),
        ("unexpected", [name for name in weights if name not in own]),
    ):
        if names:
            problems.append(f"{len(names)} {kind}, first {_open_clip_name(names[0])}")
    if problems:
        raise ValueError(f"{source}: weights of another architecture: {'; '.join(problems)}")
    assert not any(tensor.is_meta for tensor in own.values()), "weights would be lost on the meta device"


def _open_clip_name(name: str) -> str:
    return f"visual.{name.removeprefix(_VISUAL)}" if name.startswith(_VISUAL) else name
