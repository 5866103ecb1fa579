"""The runs of a table: one a row and seed, with its command, its folder, its file of results, and how it starts."""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import row_files, table_files
from tools.row_files import COMMAND_FILE, ROOT


@dataclass(frozen=True)
class Run:
    """One row with one seed; it starts when ``earlier`` has finished.

    ``command`` is that of this machine, in ``record`` it reads as in every checkout.
    """

    table: str
    row: str
    seed: int
    output: Path
    results: Path
    command: tuple[str, ...]
    earlier: Run | None = None

    @property
    def folder(self) -> Path:
        return self.output / row_files.slug(self.row) / f"seed{self.seed}"

    @property
    def file(self) -> Path:
        """The row's results, for committing."""
        return self.results / self.table / f"{row_files.slug(self.row)}-seed{self.seed}.json"

    @property
    def commands(self) -> list[str]:
        """The command, and that of the run it waits for."""
        return [*self.command, *(self.earlier.command if self.earlier else ())]

    @property
    def record(self) -> list[str]:
        """What makes the results what they are."""
        return row_files.portable(self.commands, self.output, self.table)

    def content(self) -> dict[str, Any] | None:
        """The row's results; None if there are none, or they are those of another command or of other settings.

        Raises:
            ValueError: the configuration or the file of results cannot be read.
        """
        return row_files.read_row(self.file, self.record)

    def differences(self, folder: Path) -> list[str]:
        """What the finished run in ``folder`` was made with other than this row now has, a message each."""
        if not ((folder / COMMAND_FILE).is_file() and (folder / "results.json").is_file()):
            return [f"{folder} holds no finished run"]
        found = row_files.differences(self.record, folder, self.table)
        if self.earlier and not found:
            found = self.earlier.differences(folder.parents[1] / row_files.slug(self.earlier.row) / folder.name)
        return found

    @property
    def finished(self) -> bool:
        """Whether the folder holds what exactly this row makes: results, and weights for rows that come after."""
        return not self.differences(self.folder)

    def keep(self, folder: Path, code: str | None, accepted: Sequence[str] = ()) -> None:
        """Write the row's file from a finished run."""
        content = {"table": self.table, "row": self.row, "seed": self.seed}
        content |= row_files.describe(self.record, folder, code=code, accepted=accepted)
        row_files.write_whole(self.file, f"{json.dumps(content, indent=1, ensure_ascii=False)}\n")

    def start(self) -> None:
        """
        Raises:
            RuntimeError: the run failed, or the earlier one has not finished.
            ValueError: the run left no results of the usual form.
        """
        if self.earlier and not self.earlier.finished:
            raise RuntimeError(f"row {self.row!r}, seed {self.seed}: row {self.earlier.row!r} has not finished")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "results.json").unlink(missing_ok=True)
        threads = {} if has_gpu() else {"OMP_NUM_THREADS": "1"}
        code_version = row_files.code_version()
        with open(self.folder / "log_of_command.txt", "w") as log:
            code = subprocess.call(
                self.command, cwd=ROOT, env={**os.environ, **threads}, stdout=log, stderr=subprocess.STDOUT
            )
        if code:
            raise RuntimeError(f"row {self.row!r}, seed {self.seed}: exit status {code}, see {log.name}")
        (self.folder / COMMAND_FILE).write_text(json.dumps(self.commands))
        self.keep(self.folder, code_version)


def runs_of(
    table: dict[str, Any], name: str, output: Path, results: Path, *, seeds: list[int] | None, pattern: str
) -> list[Run]:
    """The runs of the rows whose names match ``pattern``.

    Args:
        table: of :func:`tools.table_files.read_table`.
        name: of the table, as in ``results/NAME``.
        output: folder of the runs.
        results: folder of all tables' results.
        seeds: instead of the table's.
    """
    runs = []
    for row in table["rows"]:
        if not fnmatch.fnmatch(row["name"], pattern):
            continue
        chosen = seeds or row.get("seeds") or table["seeds"]
        chosen = chosen[:1] if table_files.has_one_seed(row) else chosen
        runs += [run_of(table, name, row, seed, output, results) for seed in chosen]
    return runs


def run_of(table: dict[str, Any], name: str, row: dict[str, Any], seed: int, output: Path, results: Path) -> Run:
    """The run of one row and seed; the other arguments are those of :func:`runs_of`."""
    folder = output / row_files.slug(row["name"]) / f"seed{seed}"
    earlier = None
    if "after" in row:
        (other,) = (other for other in table["rows"] if other["name"] == row["after"])
        earlier = run_of(table, name, other, seed, output, results)
    command = [sys.executable, "train_net.py", "--config-file", row.get("config", table["config"])]
    command += ["--eval-only"] if row.get("eval_only") else []
    command += [str(opt).replace("{after}", str(earlier.folder) if earlier else "") for opt in row.get("opts", [])]
    command += ["SEED", str(seed), "OUTPUT_DIR", str(folder)]
    return Run(name, row["name"], seed, output, results, tuple(command), earlier)


def has_gpu() -> bool:
    import torch  # not for --help

    return torch.cuda.is_available()
