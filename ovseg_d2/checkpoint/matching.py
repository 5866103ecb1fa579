"""Which tensors of a file belong to which tensors of a model, and messages that say so by group."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

# Batch normalisation counts its batches for a mode that nobody here uses; old and frozen layers do not.
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Mismatch:
    """A tensor whose name is in both the file and the model, and whose shape differs."""

    name: str
    file_shape: tuple[int, ...]
    model_shape: tuple[int, ...]


@dataclass
class Match:
    """The outcome of comparing a file with a model (or with the part of it under ``scope``); nothing is loaded yet."""

    source: str
    scope: str
    prefix: str  # where the names of the file lie in the model: "" or a module path
    weights: dict[str, Tensor] = field(repr=False)
    total: int  # tensors of the model (of the scope)
    missing: list[str]
    unexpected: list[str]
    mismatched: list[Mismatch]
    parameter_groups: dict[str, set[str]] = field(repr=False)

    def load(self, model: nn.Module) -> None:
        """Copy the matching tensors into ``model``; all others keep their values."""
        model.load_state_dict(self.weights, strict=False)

    def without(self, given: Set[str]) -> Match:
        """The same, with what another file gives (names in the model) no longer missing here."""
        return replace(self, missing=[name for name in self.missing if name not in given])

    def require_whole(self) -> None:
        """Raise a one-line ``ValueError`` unless every tensor of the model is in the file, and none has no place."""
        # Weights for a module that the model has, but deeper or wider: using a part of them gives wrong results.
        beyond = [name for name in self.unexpected if group_of(name) in self.parameter_groups]
        wrong = [m.name for m in self.mismatched]
        if not (self.missing or wrong or beyond):
            return
        raise ValueError(f"{self.source} does not fit the model of this config: {self._example(beyond)}")

    def require_some(self) -> None:
        """Raise a one-line ``ValueError`` if no module of the model (see ``group_of``) is whole in the file."""
        whole = [group for group, names in self.parameter_groups.items() if names <= self.weights.keys()]
        if whole:
            return
        raise ValueError(
            f"{self.source} is a checkpoint of another architecture, no module of the model is whole in it: "
            f"{self._example(self.unexpected)}"
        )

    def _example(self, unexpected: list[str]) -> str:
        """How much matched, and one tensor a kind of difference."""
        parts = [f"{len(self.weights)} of {self.total} tensors match"]
        if self.mismatched:
            m = self.mismatched[0]
            parts.append(f"{m.name} is {m.file_shape} in the file, {m.model_shape} in the model")
        if self.missing:
            parts.append(f"{len(self.missing)} missing, expected for example {self.missing[0]}")
        if unexpected:
            parts.append(f"{len(unexpected)} without a place in the model, found for example {unexpected[0]}")
        return "; ".join(parts)

    @property
    def complete(self) -> bool:
        """Every tensor of the file is used, and every tensor of the model (of the scope) has got a value."""
        return not (self.missing or self.unexpected or self.mismatched)

    def summary(self) -> str:
        """What was loaded and, a line each, what keeps its initial value, what is not used, and what does not fit."""
        under = f" under {self.prefix}" if self.prefix else ""
        within = f" of {self.scope}" if self.scope else ""
        lines = [f"loaded {len(self.weights)} of {self.total} tensors{within}{under} from {self.source}"]
        if self.mismatched:
            shapes = (f"{m.name}: file {m.file_shape}, model {m.model_shape}" for m in self.mismatched)
            lines.append(f"  skipped, shapes differ, initial values kept: {'; '.join(shapes)}")
        if self.missing:
            lines.append(f"  not in the file, initial values kept: {describe_groups(self.missing)}")
        if self.unexpected:
            lines.append(f"  in the file, not in the model: {describe_groups(self.unexpected)}")
        return "\n".join(lines)


def match_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, source: str, scope: str = "", prefix: str | None = None
) -> Match:
    """Compare ``state_dict`` with ``model``.

    Names may lack the path of the module that they are for (the files of ImageNet backbones): of all module paths the
    one is taken under which most of them match.

    Args:
        source: how messages name the file.
        scope: a module path, to load only this part of the model; the rest of the file is left alone.
        prefix: take this module path instead of the best one.
    """
    inside = f"{scope}." if scope else ""
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if name.startswith(inside)}
    if prefix is None:
        prefix = _best_prefix(tensors, state_dict)
    named = {f"{prefix}.{name}" if prefix else name: tensor for name, tensor in state_dict.items()}
    if not prefix:
        named = {name: tensor for name, tensor in named.items() if name.startswith(inside)}

    weights, mismatched = {}, []
    for name in named.keys() & tensors.keys():
        file_shape, model_shape = tuple(named[name].shape), tuple(tensors[name].shape)
        if file_shape == model_shape:
            weights[name] = named[name]
        else:
            mismatched.append(Mismatch(name, file_shape, model_shape))

    # A tensor that has two names in the model (tied weights) is there when one of them is.
    loaded = {id(tensors[name]) for name in weights}
    missing = [name for name, t in tensors.items() if name not in named and id(t) not in loaded]
    groups = defaultdict(set)
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter) and group_of(name):
            groups[group_of(name)].add(name)
    return Match(
        source=source,
        scope=scope,
        prefix=prefix,
        weights=weights,
        total=len(tensors),
        missing=[name for name in missing if not name.endswith(COUNTER)],
        unexpected=[name for name in named if name not in tensors and not name.endswith(COUNTER)],
        mismatched=sorted(mismatched, key=lambda m: m.name),
        parameter_groups=dict(groups),
    )


def _best_prefix(tensors: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> str:
    """The module path under which most names of the file are names of the model; the shortest of equally good ones."""
    counts: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in state_dict:
                counts[".".join(parts[:i])] += 1
    return min(counts, key=lambda path: (-counts[path], len(path)), default="")


def group_of(name: str) -> str:
    """The module, at most two levels deep, that a tensor is in: ``proposals.backbone.stem.conv1.weight`` is in
    ``proposals.backbone``."""
    return ".".join(name.split(".")[:-1][:2])


def describe_groups(names: Iterable[str], *, examples: int = 3) -> str:
    """``proposals.backbone 265 (stem.conv1.weight, ...), proposals.pixel_decoder 2 (a.weight, a.bias)``."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[group_of(name)].append(name)
    parts = []
    for group, members in groups.items():
        first = [name.removeprefix(f"{group}.") for name in members[:examples]]
        shown = ", ".join(first) + (", ..." if len(members) > examples else "")
        parts.append(f"{group or 'top level'} {len(members)} ({shown})")
    return ", ".join(parts)
