#!/usr/bin/env python
"""Train and evaluate every row of a table, and print the table.

    python tools/run_table.py tools/tables/maft.yaml
    python tools/run_table.py tools/tables/maft.yaml --rows '*start layer*' --seeds 1
    python tools/run_table.py tools/tables/maft.yaml --rows 'start layer 4' --again
    python tools/run_table.py tools/tables/maft.yaml --import /elsewhere/output/tables/maft

A table is a YAML file:

    title: what the table shows
    prepare:                      # commands that run first, each unless its file is there
      - makes: output/masks/ovshapes_val.jsonl
        run: python tools/export_proposals.py ...
    config: configs/ovshapes/maft.yaml
    metrics: [mIoU, mIoU_seen, mIoU_unseen, hIoU]    # of DATASETS.TEST's first dataset, task sem_seg
    seeds: [1, 2, 3]
    rows:
      - name: what the row is
        opts: [MODEL.OVSEG.MAFT.START_LAYER, 4]      # overrides of the config
        config: another.yaml                         # optional
        seeds: [1]                                   # optional
        eval_only: true                              # optional: nothing is trained; one seed, unless `after` is set
        after: another row                           # optional: waits for that row; in opts {after} is its folder
        chart: MAFT                                  # optional: the row's name in the chart of tools/compare.py

Every row and seed is a run of train_net.py in OUTPUT/ROW/seedN; when it has finished, its results go to
results/TABLE/ROW-seedN.json (see tools/row_files.py), which is for committing. A row with such a file is not run again
as long as its command and its settings stay the same, so a table that was stopped goes on where it was, and a changed
row alone is made anew. What `prepare` made is taken as it is. Results of an older version of the code stay, too, unless
--stale is given. As many runs go side by side as there are CPU cores, one thread each, or one run at a time on a GPU.
The table (mean, and standard deviation over the seeds) is also written to OUTPUT/table.md.

--import takes the finished runs of another checkout over: the folder of a table, or of one run. Each must have been
made with the command and the settings that its row has now; --accept names keys whose difference changes nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is there, not that above

from tools import row_files  # noqa: E402
from tools.row_files import COMMAND_FILE  # noqa: E402

RESULTS = ROOT / "results"


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
        return self.output / slug(self.row) / f"seed{self.seed}"

    @property
    def file(self) -> Path:
        """The row's results, for committing."""
        return self.results / self.table / f"{slug(self.row)}-seed{self.seed}.json"

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
            found = self.earlier.differences(folder.parents[1] / slug(self.earlier.row) / folder.name)
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
        threads = {} if _has_gpu() else {"OMP_NUM_THREADS": "1"}
        code_version = row_files.code_version()
        with open(self.folder / "log_of_command.txt", "w") as log:
            code = subprocess.call(
                self.command, cwd=ROOT, env={**os.environ, **threads}, stdout=log, stderr=subprocess.STDOUT
            )
        if code:
            raise RuntimeError(f"row {self.row!r}, seed {self.seed}: exit status {code}, see {log.name}")
        (self.folder / COMMAND_FILE).write_text(json.dumps(self.commands))
        self.keep(self.folder, code_version)


def read_table(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: no such table, a key is missing or unknown, or two rows have one name.
    """
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(table, dict) or not isinstance(table.get("rows", []), list):
        raise ValueError(f"{path} is no table; expected keys with values, and a list of rows")
    nameless = [row for row in table.get("rows", []) if not isinstance(row, dict) or "name" not in row]
    if nameless:
        raise ValueError(f"{path}: a row has no name: {nameless[0]}")
    keys = {"title", "prepare", "config", "metrics", "seeds", "rows"}
    row_keys = {"name", "opts", "config", "seeds", "eval_only", "after", "chart"}
    for where, found, allowed in [
        (str(path), table, keys),
        *((f"{path}: row {row.get('name')!r}", row, row_keys) for row in table.get("rows", [])),
    ]:
        unknown = sorted(set(found) - allowed)
        if unknown:
            raise ValueError(f"{where}: unknown key {unknown[0]!r}; allowed are {', '.join(sorted(allowed))}")
    missing = sorted(keys - {"prepare"} - set(table))
    if missing:
        raise ValueError(f"{path}: no {', '.join(missing)}")
    slugs = [slug(row["name"]) for row in table["rows"]]
    doubled = [row["name"] for row, slug in zip(table["rows"], slugs, strict=True) if slugs.count(slug) > 1]
    if doubled:
        raise ValueError(f"{path}: two rows are called {doubled[0]!r}")
    independent = {row["name"] for row in table["rows"] if "after" not in row}
    for row in table["rows"]:
        if row.get("after", next(iter(independent), "")) not in independent:
            raise ValueError(
                f"{path}: row {row['name']!r} is after {row['after']!r}, which is no row, or itself waits for another"
            )
    return table


def runs_of(
    table: dict[str, Any], name: str, output: Path, results: Path, *, seeds: list[int] | None, pattern: str
) -> list[Run]:
    """The runs of the rows whose names match ``pattern``.

    Args:
        table: of :func:`read_table`.
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
        chosen = chosen[:1] if has_one_seed(row) else chosen
        runs += [run_of(table, name, row, seed, output, results) for seed in chosen]
    return runs


def has_one_seed(row: dict[str, Any]) -> bool:
    """Nothing is trained, here or before: every seed gives the same."""
    return bool(row.get("eval_only")) and "after" not in row


def run_of(table: dict[str, Any], name: str, row: dict[str, Any], seed: int, output: Path, results: Path) -> Run:
    """The run of one row and seed; the other arguments are those of :func:`runs_of`."""
    folder = output / slug(row["name"]) / f"seed{seed}"
    earlier = None
    if "after" in row:
        (other,) = (other for other in table["rows"] if other["name"] == row["after"])
        earlier = run_of(table, name, other, seed, output, results)
    command = [sys.executable, "train_net.py", "--config-file", row.get("config", table["config"])]
    command += ["--eval-only"] if row.get("eval_only") else []
    command += [str(opt).replace("{after}", str(earlier.folder) if earlier else "") for opt in row.get("opts", [])]
    command += ["SEED", str(seed), "OUTPUT_DIR", str(folder)]
    return Run(name, row["name"], seed, output, results, tuple(command), earlier)


def prepare(table: dict[str, Any]) -> None:
    """
    Raises:
        RuntimeError: a command failed or did not make its file.
    """
    for step in table.get("prepare") or []:
        if (ROOT / step["makes"]).exists():
            continue
        command = shlex.split(step["run"])
        command = [sys.executable if command[0] == "python" else command[0], *command[1:]]
        if subprocess.call(command, cwd=ROOT) or not (ROOT / step["makes"]).exists():
            raise RuntimeError(f"{step['run']} failed, or did not make {step['makes']}")


def metrics_of(run: Run, content: dict[str, Any], names: list[str]) -> dict[str, float | None]:
    """The metrics of the first dataset; None for one that is a mean over nothing.

    Raises:
        ValueError: there is no such metric.
    """
    scores = content["metrics"]
    unknown = [name for name in names if name not in scores]
    if unknown:
        raise ValueError(f"metrics: {unknown[0]!r} is not among those of {run.file}, which are {', '.join(scores)}")
    return {name: scores[name] for name in names}


def cell(values: list[float | None]) -> str:
    """Mean and standard deviation over the seeds."""
    known = [value for value in values if value is not None]
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}" if known else "-"


def markdown(table: dict[str, Any], runs: list[Run]) -> str:
    """The rows that have results."""
    names = table["metrics"]
    lines = [f"| {table['title']} | seeds | {' | '.join(names)} |", "|---|---|" + "---:|" * len(names)]
    for row in table["rows"]:
        found = [(run, content) for run in runs if run.row == row["name"] and (content := run.content())]
        if not found:
            continue
        scores = [metrics_of(run, content, names) for run, content in found]
        cells = [cell([score[name] for score in scores]) for name in names]
        seeds = "-" if has_one_seed(row) else ", ".join(str(run.seed) for run, _ in found)
        lines.append(f"| {row['name']} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def complete(
    table: dict[str, Any], runs: list[Run], *, jobs: int | None, stale: bool = False, again: bool = False
) -> list[str]:
    """Make the results that are missing, from finished runs' folders or by running; messages of what failed.

    Args:
        table: of the runs, for what it prepares.
        runs: all that should have results.
        jobs: runs side by side.
        stale: also make those anew that an older version of the code made.
        again: make all anew.

    Raises:
        RuntimeError: a preparation failed.
        ValueError: a configuration or a file of results cannot be read.
    """
    code = row_files.code_version()
    todo: list[Run] = []
    for run in runs:
        content = None if again else run.content()
        if content and (content["code"] == code or not stale):
            continue
        if not (again or content) and run.finished:
            run.keep(run.folder, row_files.code_of_run(run.folder))
            continue
        if run.earlier and not run.earlier.finished:
            todo.append(run.earlier)
        todo.append(run)
    if not todo:
        return []
    prepare(table)
    return _work(list(dict.fromkeys(todo)), jobs or (1 if _has_gpu() else os.cpu_count() or 1))


def take_over(
    table: dict[str, Any], name: str, folder: Path, results: Path, *, pattern: str, accepted: Sequence[str]
) -> tuple[list[Path], list[str]]:
    """Write the files of rows from the finished runs of another checkout, unless there are newer ones.

    Args:
        table: of :func:`read_table`.
        name: of the table.
        folder: of all runs of the table, or of one.
        results: folder of all tables' results.
        pattern: only rows whose names match.
        accepted: keys that may differ.

    Returns:
        The files written, and a message for each run that does not belong to the table.

    Raises:
        ValueError: there is no finished run.
    """
    found = (
        [folder] if (folder / COMMAND_FILE).is_file() else sorted(p.parent for p in folder.glob(f"*/*/{COMMAND_FILE}"))
    )
    if not found:
        raise ValueError(f"{folder} holds no finished run: no {COMMAND_FILE}, and none in its ROW/seedN folders")
    rows = {slug(row["name"]): row for row in table["rows"]}
    written, refused = [], []
    for path in found:
        place = row_files.recorded_place(json.loads((path / COMMAND_FILE).read_text()))
        row = rows.get(place.parent.name)
        if row is None:
            refused.append(f"{path}: {name} has no row {place.parent.name!r}")
            continue
        if not fnmatch.fnmatch(row["name"], pattern):
            continue
        run = run_of(table, name, row, int(place.name.removeprefix("seed")), place.parents[1], results)
        wrong = [text for text in run.differences(path) if text.partition(":")[0] not in accepted]
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            refused.append(f"row {run.row!r}, seed {run.seed}: {wrong[0]}{more}")
            continue
        kept = run.content()
        if kept and datetime.fromisoformat(kept["date"]) > row_files.log_span(path)[1]:
            continue
        run.keep(path, row_files.code_of_run(path), accepted)
        written.append(run.file)
    return written, refused


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="YAML file of the table")
    parser.add_argument("--output", type=Path, help="folder of the runs (default: output/tables/NAME)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the tables' results (default: results)"
    )
    parser.add_argument("--rows", default="*", metavar="PATTERN", help="only rows whose name matches, * and ? allowed")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the table's")
    parser.add_argument("--jobs", type=int, help="runs side by side (default: CPU cores; 1 with a GPU)")
    parser.add_argument("--stale", action="store_true", help="run rows anew that an older version of the code made")
    parser.add_argument("--again", action="store_true", help="run all chosen rows anew")
    parser.add_argument(
        "--import", type=Path, dest="folder", metavar="FOLDER", help="take finished runs over, run none"
    )
    parser.add_argument("--accept", nargs="+", default=[], metavar="KEY", help="with --import: keys that may differ")
    args = parser.parse_args(argv)
    failed: list[str] = []
    try:
        table, name = read_table(args.table), args.table.stem
        output = (args.output or Path("output/tables") / name).resolve()
        runs = runs_of(table, name, output, args.results, seeds=args.seeds, pattern=args.rows)
        if not runs:
            raise ValueError(f"--rows {args.rows!r} matches none of the {len(table['rows'])} rows")
        if args.folder:
            written, failed = take_over(table, name, args.folder, args.results, pattern=args.rows, accepted=args.accept)
            sys.stdout.writelines(f"{path}\n" for path in written)
        else:
            failed = complete(table, runs, jobs=args.jobs, stale=args.stale, again=args.again)
            text = markdown(table, runs_of(table, name, output, args.results, seeds=args.seeds, pattern="*"))
            row_files.write_whole(output / "table.md", f"{text}\n")
            sys.stdout.write(f"{text}\n")
    except (ValueError, RuntimeError, OSError) as error:
        failed = [*failed, str(error)]
    for message in failed:
        sys.stderr.write(f"run_table: {message}\n")
    return 1 if failed else 0


def _work(todo: list[Run], jobs: int) -> list[str]:
    """Run all, ``jobs`` at a time; messages of those that failed."""
    failed = []

    def one(run: Run) -> None:
        try:
            run.start()
        except (RuntimeError, ValueError, OSError) as error:
            failed.append(str(error))
        bar.update()

    with tqdm(total=len(todo), desc="runs", unit="run", disable=not todo) as bar, ThreadPoolExecutor(jobs) as pool:
        for waits in (False, True):
            list(pool.map(one, [run for run in todo if (run.earlier is not None) is waits]))
    return failed


def slug(name: str) -> str:
    """A row's name as that of a folder."""
    return re.sub(r"[^a-z0-9.]+", "_", name.lower()).strip("_")


def _has_gpu() -> bool:
    import torch  # not for --help

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
