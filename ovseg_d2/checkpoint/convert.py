"""Public checkpoints to our names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from ovseg_d2.checkpoint.key_maps import KEY_MAPS, KeyMap

_CLIP = "clip."
# Parts of our models; no public layout has them at the top.
_OWN = ("proposals.", "clip.visual.", "clip.text.", "prompts.")


@dataclass(frozen=True)
class Conversion:
    """A checkpoint in our names.

    Attributes:
        weights: our name -> tensor.
        key_map: the public layout that was recognised; None for our own names and those of unknown origin.
        names: official name -> our name of what was renamed, not of what was joined.
        dropped: official names that have no counterpart here.
        untouched: names that are none of the layout's; they are kept as they are.
    """

    weights: dict[str, Tensor] = field(repr=False)
    key_map: KeyMap | None = None
    names: Mapping[str, str] = field(default_factory=dict, repr=False)
    dropped: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.key_map is None:
            return "keys taken as they are"
        note = f", {len(self.dropped)} without counterpart dropped ({self.dropped[0]}, ...)" if self.dropped else ""
        return f"{self.key_map.name}: {len(self.weights)} keys renamed{note}"


def convert_checkpoint(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Rename the keys of a public checkpoint; a dict in our own names, or of unknown origin, comes back as it is.

    Args:
        state_dict: name -> tensor.

    Raises:
        ValueError: two keys are for the same tensor.
    """
    key_map = find_key_map(state_dict)
    if key_map is None:
        return Conversion(weights=dict(state_dict))
    rows = {key for keys in key_map.joined.values() for key in keys}
    names = {key: key_map.rename(key) for key in state_dict if key not in rows}
    origin: dict[str, str] = {}
    for key, name in names.items():
        if name is not None and origin.setdefault(name, key) != key:
            raise ValueError(f"{key_map.name}: {origin[name]} and {key} are both for {name}, expected one of them")
    weights = {name: state_dict[key] for name, key in origin.items()}
    for name, keys in key_map.joined.items():
        if parts := [state_dict[key] for key in keys if key in state_dict]:
            weights[name] = torch.cat(parts)
    return Conversion(
        weights=weights,
        key_map=key_map,
        names={key: name for key, name in names.items() if name is not None},
        dropped=tuple(key for key, name in names.items() if name is None),
        untouched=tuple(key for key, name in names.items() if name == key and key_map.rules),
    )


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """:func:`convert_checkpoint` as the renamed dict, and a line for the log: which layout was recognised and how many
    keys were dropped."""
    conversion = convert_checkpoint(state_dict)
    return conversion.weights, str(conversion)


def find_key_map(names: Iterable[str]) -> KeyMap | None:
    """The public layout of a file with these keys, None if it is none that is known."""
    names = set(names)
    return next((key_map for key_map in KEY_MAPS if key_map.recognises(names)), None)


def is_own(names: Iterable[str]) -> bool:
    """Whether these are names of this project's models."""
    return any(name.startswith(_OWN) for name in names)


def unknown_format(names: Iterable[str], source: str) -> str:
    """One line for a file that is neither ours nor of a public layout."""
    first = list(islice(names, 10))
    tried = ", ".join(("this project's own", *(key_map.name for key_map in KEY_MAPS)))
    return f"{source} matches no known format; its first {len(first)} keys: {', '.join(first)}; formats tried: {tried}"


def clip_part(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The CLIP in a checkpoint of a whole model, ours or a public one, without what a method added beside its towers;
    any other dict comes back as it is."""
    converted, _ = convert_state_dict(state_dict)
    inside = {name.removeprefix(_CLIP): t for name, t in converted.items() if name.startswith(_CLIP)}
    clip = {name: t for name, t in inside.items() if name.startswith(("visual.tower.", "text.", "logit_scale"))}
    return clip or dict(state_dict)
