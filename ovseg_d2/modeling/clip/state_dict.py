"""open_clip's state dicts -> those of :class:`Clip`, and how they are loaded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.clip.trainable import split_packed_weights

_VISUAL = "visual.tower."
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
    if clip.text is None:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("text.")}
    own = clip.state_dict()
    own = {name: own[name] for name in pretrained_names(clip)}
    if "logit_scale" in weights and weights["logit_scale"].numel() == 1:
        weights["logit_scale"] = weights["logit_scale"].reshape(own["logit_scale"].shape)
    weights = split_packed_weights(weights, own)

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
    clip.load_state_dict(weights, strict=False)
    return len(weights)


def _open_clip_name(name: str) -> str:
    return f"visual.{name.removeprefix(_VISUAL)}" if name.startswith(_VISUAL) else name
