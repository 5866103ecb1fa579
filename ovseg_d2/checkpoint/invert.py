"""From our names back to those of a public code, so that it can use what was trained here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ovseg_d2.checkpoint.convert import convert_checkpoint, unknown_format
from ovseg_d2.checkpoint.matching import COUNTER
from ovseg_d2.modeling.clip.state_dict import fitted_weights


@dataclass(frozen=True)
class Inversion:
    """A checkpoint in official names.

    Attributes:
        weights: official name -> tensor.
        layout: the public layout's name.
        copied: official names that have no counterpart here; their tensors are those of the official file.
        unused: our names that have no place in the public layout.
    """

    weights: dict[str, Tensor] = field(repr=False)
    layout: str
    copied: tuple[str, ...]
    unused: tuple[str, ...]


def invert_state_dict(state_dict: Mapping[str, Tensor], like: Mapping[str, Tensor], *, source: str) -> Inversion:
    """Name the tensors of our checkpoint as a public file of the same architecture has them.

    Several official names can stand for one of ours (releases differ), and some tensors are not kept here; the public
    file decides both.

    Args:
        state_dict: in our names, whole.
        like: the public file: its names and shapes are taken, and its tensors where there is no counterpart here.
        source: what messages call the public file.

    Raises:
        ValueError: the public file is of no known layout, or of another architecture.
    """
    expected = convert_checkpoint(like)
    key_map = expected.key_map
    if key_map is None:
        raise ValueError(unknown_format(like, source))
    own = fitted_weights(state_dict, expected.weights)
    for name, tensor in expected.weights.items():
        if name not in own and name.endswith(COUNTER):
            own[name] = tensor
        elif name not in own:
            raise ValueError(f"{source} ({key_map.name}) has {name} in our names, which the checkpoint lacks")
        elif own[name].shape != tensor.shape:
            raise ValueError(
                f"{source} ({key_map.name}) is of another architecture: {name} is {tuple(tensor.shape)} there, "
                f"{tuple(own[name].shape)} in the checkpoint"
            )
    rows: dict[str, Tensor] = {}
    for name, keys in key_map.joined.items():
        parts = [key for key in keys if key in like]
        if parts:
            rows.update(zip(parts, own[name].split([len(like[key]) for key in parts]), strict=True))
    weights = rows | {key: own[name] for key, name in expected.names.items()}
    return Inversion(
        weights={key: weights.get(key, tensor) for key, tensor in like.items()},
        layout=key_map.name,
        copied=expected.dropped,
        unused=tuple(name for name in own if name not in expected.weights and not name.endswith(COUNTER)),
    )
