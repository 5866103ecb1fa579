"""Compare the project's modules with parity vectors: recorded inputs, weights and outputs of reference implementations.

    python tests/parity.py --goldens DIR [--family F]... [--case FAMILY/TOPIC/CASE]...

Runs every case below DIR (``DIR/FAMILY/TOPIC/CASE/``) that holds ``tensors.safetensors`` or ``expected.json``, and
prints

    family/topic/case  compared/total outputs  max_abs  worst |a-b|/(atol+rtol*|b|)  ok|FAIL|unsupported: why

Every output is compared, unless ``DIR/exceptions.json`` names it. Floats: rtol 1e-4, atol 5e-5. Integers, booleans and
ids must be equal. Exit code 1 after any FAIL or unsupported case, or if there is no case at all.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

if __name__ == "__main__":  # run as a file: make "tests" importable, under the one name that the families use
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RTOL, ATOL = 1e-4, 5e-5
#: Files of tests/parity_families; each says in ``TOPICS`` which "family/topic" it runs.
PARTS = (
    "mask2former",
    "mask2former_losses",
    "mask2former_model",
    "evaluation",
    "clip_conv",
    "clip_vit",
    "clip_text",
    "fcclip",
    "crops",
    "maskclippp",
    "maft_train",
    "maft_plus",
    "maft_freeseg",
    "maft_panoptic",
    "mta",
    "ldvc_losses",
    "fgaseg_model",
    "fgaseg_alignment",
    "fgaseg_cost",
    "ldvc",
)


class Unsupported(Exception):
    """The project has no counterpart for a case; the message says what is missing."""


@dataclass
class Case:
    """One recorded case.

    Attributes:
        name: family/topic/case.
        meta: what was run (constructor arguments and so on).
        inputs, params, expected: by name, without their ``in/``, ``param/``, ``out/``.
    """

    name: str
    folder: Path
    meta: dict[str, Any]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    params: dict[str, Tensor] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)

    @property
    def topic(self) -> str:
        return self.name.rsplit("/", 1)[0]

    def indexed(self, pattern: str) -> list[Tensor]:
        """Inputs ``pattern.format(0)``, ``pattern.format(1)``, ... as far as they go."""
        found = []
        while pattern.format(len(found)) in self.inputs:
            found.append(self.inputs[pattern.format(len(found))])
        return found


def load_case(root: Path, folder: Path) -> Case:
    """Read a case's folder. Keys of ``expected.json`` are joined with slashes."""
    meta = json.loads((folder / "meta.json").read_text())
    case = Case(name=folder.relative_to(root).as_posix(), folder=folder, meta=meta)
    if (folder / "tensors.safetensors").exists():
        parts = {"in": case.inputs, "param": case.params, "out": case.expected}
        integers = meta.get("original_dtypes_stored_as_float32", {})
        for key, tensor in load_file(folder / "tensors.safetensors").items():
            part, name = key.split("/", 1)
            if key in integers:
                tensor = tensor.to(getattr(torch, integers[key]))
            parts[part][name] = tensor
    if (folder / "expected.json").exists():
        case.expected.update(flatten(json.loads((folder / "expected.json").read_text())))
    if meta.get("segments_info"):
        case.expected["segments_info"] = meta["segments_info"]
    return case


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """{"a": {"b": 1}} -> {"a/b": 1}."""
    flat: dict[str, float] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


@dataclass
class Difference:
    """How far two values are apart; ``ratio`` above 1 is a failure."""

    max_abs: float
    ratio: float


def difference(got: Any, expected: Any, *, rtol: float, atol: float, max_flipped: int = 0) -> Difference:
    """Compare tensors, numbers or JSON structures; the latter and everything that is not a float must be equal.

    ``max_flipped``: how many pixels of each mask (..., h, w), or of each picture (..., C, h, w) of floats, may be off.
    """
    if not isinstance(expected, (Tensor, int, float)):
        return Difference(0.0, 0.0) if got == expected else Difference(float("inf"), float("inf"))
    # Python's floats are float64, which torch would cut to its default.
    got, expected = (
        torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else torch.as_tensor(x).detach()
        for x in (got, expected)
    )
    if got.shape != expected.shape:
        return Difference(float("inf"), float("inf"))
    if expected.numel() == 0:
        return Difference(0.0, 0.0)
    exact = not (got.is_floating_point() and expected.is_floating_point())
    got, expected = got.double(), expected.double()
    both_special = (got == expected) | (got.isnan() & expected.isnan())
    gap = torch.where(both_special, 0.0, (got - expected).abs()).nan_to_num(nan=float("inf"))
    ratio = torch.where(gap == 0, 0.0, float("inf")) if exact else gap / (atol + rtol * expected.abs())
    if max_flipped:
        off = ratio > 1 if exact else (ratio > 1).any(dim=-3, keepdim=True)
        few = off.sum(dim=tuple(range(-min(2, off.dim()), 0)), keepdim=True) <= max_flipped
        ratio = torch.where(off & few, 0.0, ratio)
    return Difference(float(gap.max()), float(torch.where(gap == 0, 0.0, ratio).max()))


@dataclass
class Exceptions:
    """What ``exceptions.json`` says of one case."""

    skipped: list[str] = field(default_factory=list)
    flipped: dict[str, int] = field(default_factory=dict)
    rtol: float | None = None

    @classmethod
    def for_case(cls, table: dict[str, Any], name: str) -> Exceptions:
        result = cls()
        for pattern, entry in table.items():
            if fnmatch.fnmatch(name, pattern):
                result.skipped += entry.get("skip", [])
                result.rtol = entry.get("rtol", result.rtol)
                for output in entry.get("outputs", []):
                    result.flipped[output] = entry.get("max_flipped_pixels", 0)
        return result

    def skips(self, output: str) -> bool:
        return any(fnmatch.fnmatch(output, pattern) for pattern in self.skipped)

    def max_flipped(self, output: str) -> int:
        return max((n for pattern, n in self.flipped.items() if fnmatch.fnmatch(output, pattern)), default=0)


def run_case(case: Case, run: Callable[[Case], dict[str, Any]], exceptions: Exceptions) -> tuple[bool, str]:
    """Whether the case passes, and its line."""
    try:
        outputs = run(case)
    except Unsupported as error:
        return False, f"{case.name}  0/{len(case.expected)}  -  -  unsupported: {error}"
    except Exception as error:  # a broken case must not hide the others
        text = str(error).splitlines()
        return False, f"{case.name}  0/{len(case.expected)}  -  -  FAIL: {type(error).__name__}: {(text or [''])[0]}"
    compared, max_abs, worst, failures = 0, 0.0, 0.0, []
    for name, expected in sorted(case.expected.items()):
        if exceptions.skips(name):
            continue
        if name not in outputs:
            failures.append(f"{name} not computed")
            continue
        gap = difference(
            outputs[name],
            expected,
            # A relative bound that a case sets for itself leaves no room for an absolute one.
            rtol=exceptions.rtol or RTOL,
            atol=0.0 if exceptions.rtol else ATOL,
            max_flipped=exceptions.max_flipped(name),
        )
        compared += 1
        max_abs, worst = max(max_abs, gap.max_abs), max(worst, gap.ratio)
        if gap.ratio > 1:
            failures.append(f"{name} off by {gap.max_abs:.3g}")
    if compared == 0:
        failures.append("nothing was compared")
    verdict = f"FAIL: {'; '.join(failures[:4])}{' ...' if len(failures) > 4 else ''}" if failures else "ok"
    return not failures, f"{case.name}  {compared}/{len(case.expected)}  {max_abs:.2e}  {worst:.3f}  {verdict}"


def find_cases(root: Path, families: list[str], names: list[str]) -> Iterator[Path]:
    """Folders of the chosen cases that have something to compare."""
    for meta in sorted(root.glob("*/*/*/meta.json")):
        folder = meta.parent
        name = folder.relative_to(root).as_posix()
        chosen = (not families and not names) or name.split("/")[0] in families or name in names
        if chosen and any((folder / file).exists() for file in ("tensors.safetensors", "expected.json")):
            yield folder


def runner_of(case: Case) -> Callable[[Case], dict[str, Any]]:
    """The function that computes a case's outputs: ``TOPICS["family/topic"]`` of a file of tests/parity_families."""
    for part in PARTS:
        topics = importlib.import_module(f"tests.parity_families.{part}").TOPICS
        if case.topic in topics:
            return topics[case.topic]
    raise Unsupported(f"no topic {case.topic}")


def check(root: Path, folder: Path) -> tuple[bool, str]:
    """Whether the case in ``folder`` below ``root`` passes, and its line."""
    table_file = root / "exceptions.json"
    table = json.loads(table_file.read_text()) if table_file.exists() else {}
    case = load_case(root, folder)
    torch.manual_seed(0)
    # Sums run in the order in which they were recorded: another one costs up to half of the tolerance.
    threads = torch.get_num_threads()
    torch.set_num_threads(case.meta.get("threads", threads))
    try:
        return run_case(case, lambda c: runner_of(c)(c), Exceptions.for_case(table, case.name))
    finally:
        torch.set_num_threads(threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goldens", type=Path, required=True, help="folder of FAMILY/TOPIC/CASE folders")
    parser.add_argument("--family", action="append", default=[], help="only this family; can be repeated")
    parser.add_argument("--case", action="append", default=[], help="only this FAMILY/TOPIC/CASE; can be repeated")
    args = parser.parse_args()
    results = []
    for folder in find_cases(args.goldens, args.family, args.case):
        passed, line = check(args.goldens, folder)
        print(line, flush=True)
        results.append(passed)
    if not results:
        print(f"no case with tensors.safetensors or expected.json below {args.goldens}")
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
