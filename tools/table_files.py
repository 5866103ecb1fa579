"""Tables: YAML files that say which rows there are (see tools/run_table.py for what they hold)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tools.row_files import slug

TABLES = Path(__file__).resolve().parent / "tables"
KEYS = {"title", "prepare", "config", "metrics", "seeds", "rows"}
ROW_KEYS = {"name", "opts", "config", "seeds", "eval_only", "after", "chart"}


def read_table(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: no such file, a key is missing or unknown, or two rows have one name.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; {TABLES} holds {', '.join(sorted(f.name for f in TABLES.glob('*.yaml')))}"
        )
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(table, dict) or not isinstance(table.get("rows", []), list):
        raise ValueError(f"{path} is no table; expected keys with values, and a list of rows")
    _check_keys(path, table)
    _check_names(path, table["rows"])
    return table


def has_one_seed(row: dict[str, Any]) -> bool:
    """Nothing is trained, here or before: every seed gives the same."""
    return bool(row.get("eval_only")) and "after" not in row


def _check_keys(path: Path, table: dict[str, Any]) -> None:
    rows = table.get("rows", [])
    nameless = [row for row in rows if not isinstance(row, dict) or "name" not in row]
    if nameless:
        raise ValueError(f"{path}: a row has no name: {nameless[0]}")
    named = [(f"{path}: row {row.get('name')!r}", row, ROW_KEYS) for row in rows]
    for where, found, allowed in [(str(path), table, KEYS), *named]:
        unknown = sorted(set(found) - allowed)
        if unknown:
            raise ValueError(f"{where}: unknown key {unknown[0]!r}; allowed are {', '.join(sorted(allowed))}")
    missing = sorted(KEYS - {"prepare"} - set(table))
    if missing:
        raise ValueError(f"{path}: no {', '.join(missing)}")


def _check_names(path: Path, rows: list[dict[str, Any]]) -> None:
    """Each row has a folder of its own, and waits for none or for one that waits for none."""
    folders = [slug(row["name"]) for row in rows]
    doubled = [row["name"] for row, folder in zip(rows, folders, strict=True) if folders.count(folder) > 1]
    if doubled:
        raise ValueError(f"{path}: two rows are called {doubled[0]!r}")
    independent = {row["name"] for row in rows if "after" not in row}
    for row in rows:
        if "after" in row and row["after"] not in independent:
            raise ValueError(
                f"{path}: row {row['name']!r} is after {row['after']!r}, which is no row, or itself waits for another"
            )
