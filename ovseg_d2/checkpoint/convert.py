"""Public checkpoints to our names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ovseg_d2.checkpoint.key_maps import KEY_MAPS

_CLIP = "clip."


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Rename the keys of a public checkpoint; a dict in our own names, or of unknown origin, comes back as it is.

    Args:
        state_dict: name -> tensor.

    Returns:
        The renamed dict, and a line for the log: which layout was recognised and how many keys were dropped.
    """
    for key_map in KEY_MAPS:
        if key_map.recognises(set(state_dict)):
            names = {key: key_map.rename(key) for key in state_dict}
            converted = {name: state_dict[key] for key, name in names.items() if name is not None}
            dropped = [key for key, name in names.items() if name is None]
            note = f", {len(dropped)} without counterpart dropped ({dropped[0]}, ...)" if dropped else ""
            return converted, f"{key_map.name}: {len(converted)} keys renamed{note}"
    return dict(state_dict), "keys taken as they are"


def clip_part(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The CLIP in a checkpoint of a whole model, ours or a public one, without what a method added beside its towers;
    any other dict comes back as it is."""
    converted, _ = convert_state_dict(state_dict)
    inside = {name.removeprefix(_CLIP): t for name, t in converted.items() if name.startswith(_CLIP)}
    clip = {name: t for name, t in inside.items() if name.startswith(("visual.tower.", "text.", "logit_scale"))}
    return clip or dict(state_dict)
