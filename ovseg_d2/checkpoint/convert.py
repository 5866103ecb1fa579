"""Public checkpoints to our names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ovseg_d2.checkpoint.key_maps import KEY_MAPS


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
