"""The layers of the package, held by parsing its imports, and a few habits that every module keeps."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ovseg_d2"

# Lower layers first; a module may import from its own layer and from those before it. A package stands for all modules
# below it that have no line of their own.
LAYERS = (
    ("structures", "modeling.layers", "checkpoint.io", "model_zoo"),
    ("config",),
    ("data",),
    ("modeling.backbones", "modeling.clip"),
    ("modeling.text_classifier",),
    ("modeling.mask_classification", "modeling.pixel_classification"),
    ("modeling.proposals",),
    ("modeling.losses", "modeling.inference"),
    ("modeling.meta_arch", "modeling"),
    ("checkpoint", "evaluation", "engine"),
    ("visualization", "predictor", "inspection"),
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
TEST_MODULES = ("tests", "conftest", "helpers")


def modules(package: Path) -> dict[str, Path]:
    """Module names below the package ("" for the package itself) -> files."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imported_names(path: Path, name: str, package: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, wherever it stands; ``from a import b`` gives ``a.b``."""
    here = [package.name, *filter(None, name.split("."))]
    if path.name != "__init__.py":
        here = here[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = [*base, *filter(None, (node.module or "").split("."))]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def unit_of(name: str) -> str | None:
    """The longest entry of ``LAYERS`` that ``name`` (without the package's own name) is in or below."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in RANK), None)


def layer_violations(package: Path) -> list[str]:
    """One line for each import that goes up, and for each module that no layer names."""
    found = []
    known = modules(package)
    for name, path in known.items():
        if not name:
            continue
        unit = unit_of(name)
        if unit is None:
            found.append(f"{name}: not in any layer")
            continue
        for line, target in imported_names(path, name, package):
            root, _, inner = target.partition(".")
            if root != package.name or not inner:
                continue
            imported = unit_of(inner)
            if imported is None:
                if inner in known or "." in inner:  # else a name that the package itself defines
                    found.append(f"{name}:{line} imports {inner}, which is not in any layer")
            elif RANK[imported] > RANK[unit]:
                found.append(f"{name}:{line} imports {inner}, which is above it")
    return found


def cyclic_units(package: Path) -> list[str]:
    """Units that import each other; within one layer the order is free, but there is one."""
    edges: dict[str, set[str]] = {}
    for name, path in modules(package).items():
        unit = unit_of(name)
        if unit is None:
            continue
        for _, target in imported_names(path, name, package):
            root, _, inner = target.partition(".")
            imported = unit_of(inner) if root == package.name and inner else None
            if imported not in (None, unit):
                edges.setdefault(unit, set()).add(imported)

    def reachable(start: str) -> set[str]:
        seen, todo = set(), list(edges.get(start, ()))
        while todo:
            unit = todo.pop()
            if unit not in seen:
                seen.add(unit)
                todo += edges.get(unit, ())
        return seen

    return sorted(unit for unit in edges if unit in reachable(unit))


def habit_violations(package: Path) -> list[str]:
    """Calls of print and .cuda(), imports of test modules, and cfg read in a forward."""
    found = []
    for name, path in modules(package).items():
        for line, target in imported_names(path, name, package):
            if target.partition(".")[0] in TEST_MODULES:
                found.append(f"{name}:{line} imports {target}")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                if isinstance(node.func, ast.Name) and node.func.id == "print":
                    found.append(f"{name}:{node.lineno} calls print")
                if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
                    found.append(f"{name}:{node.lineno} calls .cuda()")
            if isinstance(node, ast.FunctionDef) and node.name == "forward":
                if any(isinstance(inner, ast.Name) and inner.id == "cfg" for inner in ast.walk(node)):
                    found.append(f"{name}:{node.lineno} reads cfg in forward")
    return found


def test_imports_go_down():
    assert layer_violations(PACKAGE) == []


def test_parts_do_not_import_each_other():
    assert cyclic_units(PACKAGE) == []


def test_habits():
    assert habit_violations(PACKAGE) == []


def test_config_stands_alone():
    inside = f"{PACKAGE.name}.config"
    names = {name: path for name, path in modules(PACKAGE).items() if name.partition(".")[0] == "config"}
    imports = [target for name, path in names.items() for _, target in imported_names(path, name, PACKAGE)]
    assert inside in {target.rpartition(".")[0].rpartition(".")[0] for target in imports}
    assert not [target for target in imports if target.startswith(PACKAGE.name) and not target.startswith(inside)]


# ---- the checks themselves


def make_package(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "ovseg_d2"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("data/build.py", "import ovseg_d2.engine", "data.build:1 imports engine, which is above it"),
        ("data/build.py", "from ovseg_d2 import engine", "data.build:1 imports engine, which is above it"),
        ("data/build.py", "from ..engine import launch", "data.build:1 imports engine.launch, which is above it"),
        ("data/__init__.py", "from .. import engine", "data:1 imports engine, which is above it"),
        ("data/build.py", "from ovseg_d2.checkpoint import io, convert", "data.build:1 imports checkpoint.convert, wh"),
        ("structures.py", "def f():\n    from ovseg_d2 import data", "structures:2 imports data, which is above it"),
        ("misc.py", "", "misc: not in any layer"),
        (
            "engine/launch.py",
            "from ovseg_d2.misc import f",
            "engine.launch:1 imports misc.f, which is not in any layer",
        ),
    ],
)
def test_an_import_that_goes_up_is_found(tmp_path, file, text, expected):
    package = make_package(tmp_path, {"__init__.py": "", file: text})
    assert [line[: len(expected)] for line in layer_violations(package)] == [expected]


def test_imports_that_go_down_are_fine(tmp_path):
    lines = [
        "import torch",
        "from ovseg_d2 import __version__",
        "from ovseg_d2.checkpoint import io",
        "from . import b",
    ]
    lines += ["from ..structures import Vocabulary", "from ovseg_d2.config import add_ovseg_config", "import data"]
    package = make_package(tmp_path, {"__init__.py": "", "data/a.py": "\n".join(lines)})
    assert layer_violations(package) == []


def test_a_cycle_within_a_layer_is_found(tmp_path):
    files = {
        "engine/a.py": "from ovseg_d2.evaluation import b",
        "evaluation/b.py": "import ovseg_d2.checkpoint.convert",
    }
    assert cyclic_units(make_package(tmp_path, files)) == []
    files["checkpoint/convert.py"] = "from ovseg_d2.engine.a import f"
    assert cyclic_units(make_package(tmp_path, files)) == ["checkpoint", "engine", "evaluation"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f():\n    print(1)", "data.a:2 calls print"),
        ("x.cuda()", "data.a:1 calls .cuda()"),
        ("from tests.helpers import f", "data.a:1 imports tests.helpers.f"),
        ("class A:\n    def forward(self, x):\n        return cfg.MODEL", "data.a:2 reads cfg in forward"),
        ('"""print(1) and x.cuda() in text"""\nis_cuda = x.is_cuda', None),
    ],
)
def test_a_broken_habit_is_found(tmp_path, text, expected):
    assert habit_violations(make_package(tmp_path, {"data/a.py": text})) == ([expected] if expected else [])
