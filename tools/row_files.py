"""The committed results of tables: a JSON file a row and seed, and what tells whether it still belongs to its row.

``results/TABLE/ROW-seedN.json`` holds the metrics of the first dataset's semantic task, the command, hashes of the
settings and of the code, minutes, device and threads, and the date. The settings are all keys that the configuration
file, the files that it is based on and the command set. With another command or other settings a file belongs to the
row no more; with other code (which includes the keys' defaults) it does, but counts as made with an older version.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

ROOT = Path(__file__).resolve().parents[1]
COMMAND_FILE = "command.json"
SCRIPT = "train_net.py"
# Neither changes what a number means: where a run writes, and what it runs on, which its file says.
PLACES = ("OUTPUT_DIR", "MODEL.DEVICE")
_STAMP = re.compile(r"\[(\d\d)/(\d\d) (\d\d):(\d\d):(\d\d)\] ")
_START = "Process 0 of "


def slug(name: str) -> str:
    """A row's name as that of a folder."""
    return re.sub(r"[^a-z0-9.]+", "_", name.lower()).strip("_")


def portable(words: Sequence[str], output: str | Path, table: str) -> list[str]:
    """A command as it reads in every checkout: ``python``, and ``output/tables/TABLE`` for the folder of the runs."""
    words = [in_output(word, output, table) for word in words]
    return ["python" if after == SCRIPT else word for word, after in zip(words, [*words[1:], ""], strict=True)]


def in_output(text: str, output: str | Path, table: str) -> str:
    """A path below the folder of the runs with that folder's usual name; any other text as it is."""
    return text.replace(f"{output}/", f"output/tables/{table}/") if text.startswith(f"{output}/") else text


def commands_of(record: Sequence[str]) -> list[str]:
    """The command of a run, then that of the run it waits for, as lines."""
    starts = [i - 1 for i, word in enumerate(record) if word == SCRIPT]
    return [shlex.join(record[a:b]) for a, b in zip(starts, [*starts[1:], len(record)], strict=True)]


def settings_hash(record: Sequence[str]) -> str:
    """Of the settings of a run, and of those of the run it waits for."""
    found = [settings(command) for command in commands_of(record)]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def settings(command: str) -> dict[str, Any]:
    """All keys that the file of a command, the files that it is based on and its options set, without ``PLACES``.

    Raises:
        ValueError: the file is not there, or is no plain YAML.
    """
    config_file, opts = _config_of(command)
    found = file_settings(ROOT / config_file) | {
        key: _plain(value) for key, value in zip(opts[::2], opts[1::2], strict=True)
    }
    return {key: value for key, value in sorted(found.items()) if key not in PLACES}


@cache
def file_settings(path: Path) -> dict[str, Any]:
    """All keys that a configuration file and those that it is based on set; read once."""
    try:
        content = CfgNode.load_yaml_with_base(str(path), allow_unsafe=False)
    except (OSError, yaml.YAMLError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return {key: _plain(value) for key, value in _leaves(content)}


def resolved(command: str) -> dict[str, Any]:
    """All keys of a command's configuration as this code has it, defaults included."""
    from ovseg_d2.engine.load_config import load_config  # not for what renders only

    config_file, opts = _config_of(command)
    return _flat(load_config(ROOT / config_file, opts).dump())


def differences(record: Sequence[str], folder: Path, table: str) -> list[str]:
    """What the finished run of ``folder`` was made with other than ``record`` asks for; a message each.

    Keys that the run did not know may only be missing there if nothing sets them here.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return [f"{folder} has no config.yaml"]
    made = json.loads((folder / COMMAND_FILE).read_text())
    output = recorded_place(made).parents[1]
    if (theirs := commands_of(portable(made, output, table))) != (ours := commands_of(record)):
        return [f"{folder} was made by {' after '.join(theirs)}; the row is {' after '.join(ours)}"]
    found = {
        key: in_output(v, output, table) if isinstance(v, str) else v for key, v in _flat(path.read_text()).items()
    }
    today, chosen = resolved(ours[0]), settings(ours[0])
    messages = [
        f"{key}: {folder} was made with {found[key]!r}, the row has {value!r}"
        for key, value in sorted(today.items())
        if key in found and key not in PLACES and found[key] != value
    ]
    unknown = sorted(set(chosen) - set(found))
    return messages + [f"{key}: {folder} knows no such key, the row has {chosen[key]!r}" for key in unknown]


def recorded_place(record: Sequence[str]) -> Path:
    """The folder that a run was written to, ``.../ROW/seedN``, wherever it lies now.

    Raises:
        ValueError: the record names none.
    """
    words = list(record)
    if "OUTPUT_DIR" not in words[:-1] or not re.fullmatch(r"seed\d+", Path(words[words.index("OUTPUT_DIR") + 1]).name):
        raise ValueError(f"a {COMMAND_FILE} of run_table.py has OUTPUT_DIR .../ROW/seedN, found {shlex.join(words)}")
    return Path(words[words.index("OUTPUT_DIR") + 1])


def describe(record: Sequence[str], folder: Path, *, code: str | None, accepted: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a row's file, from a finished run.

    Args:
        record: portable command of the run, and of the one that it waited for.
        folder: with the run's ``results.json``, ``log.txt`` and ``config.yaml``.
        code: :func:`code_version` of the code that made it, None if that is not known.
        accepted: keys that the run had with other values, where it makes no difference.

    Raises:
        ValueError: the log says nothing of time.
    """
    dataset, tasks = next(iter(json.loads((folder / "results.json").read_text())["results"].items()))
    start, end = log_span(folder)
    device = _flat((folder / "config.yaml").read_text()).get("MODEL.DEVICE", "cpu")
    return {
        "dataset": dataset,
        "metrics": {k: v if v is None else round(v, 4) for k, v in tasks["sem_seg"].items() if "-" not in k},
        "commands": commands_of(record),
        "settings": settings_hash(record),
        "code": code,
        "minutes": round((end - start).total_seconds() / 60, 1),
        "device": device,
        # As run_table.py starts them.
        "threads": 1 if device == "cpu" else None,
        "date": end.isoformat(sep=" ", timespec="minutes"),
        **({"accepted": list(accepted)} if accepted else {}),
    }


def read_row(path: Path, record: Sequence[str]) -> dict[str, Any] | None:
    """The content of a row's file if it belongs to the row as it is now.

    Raises:
        ValueError: the file is not one of these.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        belongs = content["commands"] == commands_of(record) and content["settings"] == settings_hash(record)
        missing = {"metrics", "code", "minutes", "device", "threads", "date"} - set(content)
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no file of a row's results: {error!r}; remove it to run the row anew") from error
    if missing:
        raise ValueError(f"{path} has no {sorted(missing)[0]!r}; remove it to run the row anew")
    return content if belongs else None


def write_whole(path: Path, content: str) -> None:
    """A reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(content, encoding="utf-8")
    os.replace(part, path)


def code_version(root: Path = ROOT) -> str:
    """A hash of all that the package is made of, and of the training script."""
    found = hashlib.sha256()
    for path in _sources(root):
        found.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def code_of_run(folder: Path) -> str | None:
    """:func:`code_version` of the tree around a run's folder; None if there is none, or it has changed since."""
    start = log_span(folder)[0].timestamp()
    for root in folder.resolve().parents:
        if (root / SCRIPT).is_file() and (root / "ovseg_d2").is_dir():
            unchanged = all(path.stat().st_mtime <= start for path in _sources(root))
            return code_version(root) if unchanged else None
    return None


def log_span(folder: Path) -> tuple[datetime, datetime]:
    """When the last run in a folder began and ended, from the time stamps of its log.

    Raises:
        ValueError: there is no log, or no stamp in it.
    """
    path = folder / "log.txt"
    if not path.is_file():
        raise ValueError(f"{folder} has no log.txt")
    stamps: list[datetime] = []
    year = datetime.fromtimestamp(path.stat().st_mtime).year  # the stamps have none
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := _STAMP.match(line):
            # A log goes on where a former run in its folder ended.
            stamps = [] if _START in line else stamps
            stamps.append(datetime(year, *(int(part) for part in match.groups())))
    if not stamps:
        raise ValueError(f"{path} has no lines that begin with [month/day hour:minute:second]")
    start, end = stamps[0], stamps[-1]
    return (start, end) if start <= end else (start - timedelta(days=365), end)


def _sources(root: Path) -> list[Path]:
    files = (path for path in (root / "ovseg_d2").rglob("*") if path.is_file() and path.suffix not in (".pyc", ".md"))
    return [root / SCRIPT, *sorted(files)]


def _config_of(command: str) -> tuple[str, list[str]]:
    words = [word for word in shlex.split(command) if word != "--eval-only"]
    start = words.index("--config-file")
    return words[start + 1], words[start + 2 :]


def _flat(text: str) -> dict[str, Any]:
    return {key: _plain(value) for key, value in _leaves(yaml.safe_load(text))}


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    """One form for values that mean the same: texts of options as what they say, tuples as lists, 1.0 as 1."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
