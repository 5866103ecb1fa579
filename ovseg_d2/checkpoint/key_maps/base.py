"""How one public layout's keys become ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

#: (pattern, replacement) pairs for ``re.sub``.
Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class KeyMap:
    """How one public layout's keys become ours.

    Attributes:
        name: what the layout is called in messages.
        recognises: whether a file's keys are of this layout. Decided by content: state dicts that were filtered or went
            through safetensors have lost their version metadata.
        rules: applied in order to every key.
        dropped: pattern of keys (official names) that have no counterpart here.
        joined: our names of tensors whose rows are those of several official keys, in this order.
    """

    name: str
    recognises: Callable[[set[str]], bool]
    rules: Rules
    dropped: str | None = None
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def rename(self, key: str) -> str | None:
        """Our name of an official key; None if it has no counterpart."""
        if self.dropped and re.search(self.dropped, key):
            return None
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key


def starting_with(*prefixes: str) -> Callable[[set[str]], bool]:
    """Whether for every prefix some key begins with it."""
    return lambda keys: all(any(key.startswith(prefix) for key in keys) for prefix in prefixes)
