#!/usr/bin/env python
"""Train and evaluate every row of a table, and print the table.

    python tools/run_table.py tools/tables/maft.yaml
    python tools/run_table.py tools/tables/maft.yaml --rows '*start layer*' --seeds 1

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

Every row and seed is a run of train_net.py in OUTPUT/ROW/SEED. Runs that are finished are not repeated as long as their
command stays the same, so a table that was stopped goes on where it was, and a changed row alone is made anew. As many
runs go side by side as there are CPU cores, one thread each, or one run at a time on a GPU. The table (mean, and
standard deviation over the seeds) is also written to OUTPUT/table.md.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
COMMAND_FILE = "command.json"


@dataclass(frozen=True)
class Run:
    """One row with one seed; it starts when ``earlier`` has finished, and is made anew when that is."""

    row: str
    seed: int
    folder: Path
    command: tuple[str, ...]
    earlier: Run | None = None

    @property
    def record(self) -> list[str]:
        """What makes the results what they are."""
        return [*self.command, *(self.earlier.command if self.earlier else ())]

    @property
    def finished(self) -> bool:
        """Whether the folder holds the results of exactly this command."""
        path = self.folder / COMMAND_FILE
        return (self.folder / "results.json").is_file() and (
            path.is_file() and json.loads(path.read_text()) == self.record
        )

    def start(self) -> None:
        """
        Raises:
            RuntimeError: the run failed, or the earlier one has not finished.
        """
        if self.earlier and not self.earlier.finished:
            raise RuntimeError(f"row {self.row!r}, seed {self.seed}: row {self.earlier.row!r} has not finished")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "results.json").unlink(missing_ok=True)
        threads = {} if _has_gpu() else {"OMP_NUM_THREADS": "1"}
        with open(self.folder / "log_of_command.txt", "w") as log:
            code = subprocess.call(
                self.command, cwd=ROOT, env={**os.environ, **threads}, stdout=log, stderr=subprocess.STDOUT
            )
        if code:
            raise RuntimeError(f"row {self.row!r}, seed {self.seed}: exit status {code}, see {log.name}")
        (self.folder / COMMAND_FILE).write_text(json.dumps(self.record))


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
    row_keys = {"name", "opts", "config", "seeds", "eval_only", "after"}
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
    slugs = [_slug(row["name"]) for row in table["rows"]]
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


def runs_of(table: dict[str, Any], output: Path, *, seeds: list[int] | None, pattern: str) -> list[Run]:
    """The runs of the rows whose names match ``pattern``."""
    runs = []
    for row in table["rows"]:
        if not fnmatch.fnmatch(row["name"], pattern):
            continue
        chosen = seeds or row.get("seeds") or table["seeds"]
        single = row.get("eval_only") and "after" not in row
        runs += [_run(table, row, seed, output) for seed in (chosen[:1] if single else chosen)]
    return runs


def _run(table: dict[str, Any], row: dict[str, Any], seed: int, output: Path) -> Run:
    folder = output / _slug(row["name"]) / f"seed{seed}"
    earlier = None
    if "after" in row:
        (other,) = (other for other in table["rows"] if other["name"] == row["after"])
        earlier = _run(table, other, seed, output)
    command = [sys.executable, "train_net.py", "--config-file", row.get("config", table["config"])]
    command += ["--eval-only"] if row.get("eval_only") else []
    command += [str(opt).replace("{after}", str(earlier.folder) if earlier else "") for opt in row.get("opts", [])]
    command += ["SEED", str(seed), "OUTPUT_DIR", str(folder)]
    return Run(row["name"], seed, folder, tuple(command), earlier)


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


def metrics_of(run: Run, names: list[str]) -> dict[str, float | None]:
    """The metrics of the first dataset; None for one that is a mean over nothing.

    Raises:
        ValueError: there is no such metric.
    """
    path = run.folder / "results.json"
    scores = next(iter(json.loads(path.read_text())["results"].values()))["sem_seg"]
    unknown = [name for name in names if name not in scores]
    if unknown:
        known = ", ".join(name for name in scores if "-" not in name)
        raise ValueError(f"metrics: {unknown[0]!r} is not among those of {path}, which are {known}")
    return {name: scores[name] for name in names}


def markdown(table: dict[str, Any], runs: list[Run]) -> str:
    """The finished rows."""
    names = table["metrics"]
    lines = [f"| {table['title']} | seeds | {' | '.join(names)} |", "|---|---|" + "---:|" * len(names)]
    for row in table["rows"]:
        mine = [run for run in runs if run.row == row["name"] and run.finished]
        if not mine:
            continue
        scores = [metrics_of(run, names) for run in mine]
        cells = []
        for name in names:
            values = [score[name] for score in scores if score[name] is not None]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "-")
        seeds = "-" if row.get("eval_only") and "after" not in row else ", ".join(str(run.seed) for run in mine)
        lines.append(f"| {row['name']} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="YAML file of the table")
    parser.add_argument("--output", type=Path, help="folder of the runs (default: output/tables/NAME)")
    parser.add_argument("--rows", default="*", metavar="PATTERN", help="only rows whose name matches, * and ? allowed")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the table's")
    parser.add_argument("--jobs", type=int, help="runs side by side (default: CPU cores; 1 with a GPU)")
    args = parser.parse_args(argv)
    try:
        table = read_table(args.table)
        output = (args.output or Path("output/tables") / args.table.stem).resolve()
        runs = runs_of(table, output, seeds=args.seeds, pattern=args.rows)
        if not runs:
            raise ValueError(f"--rows {args.rows!r} matches none of the {len(table['rows'])} rows")
        prepare(table)
        todo = [run for run in runs if not run.finished]
        jobs = args.jobs or (1 if _has_gpu() else os.cpu_count() or 1)
        failed = _work(todo, jobs)
        text = markdown(table, runs_of(table, output, seeds=args.seeds, pattern="*"))
    except (ValueError, RuntimeError, OSError) as error:
        sys.stderr.write(f"run_table: {error}\n")
        return 1
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(f"{text}\n", encoding="utf-8")
    sys.stdout.write(f"{text}\n")
    for message in failed:
        sys.stderr.write(f"run_table: {message}\n")
    return 1 if failed else 0


def _work(todo: list[Run], jobs: int) -> list[str]:
    """Run all, ``jobs`` at a time; messages of those that failed."""
    failed = []

    def one(run: Run) -> None:
        try:
            run.start()
        except RuntimeError as error:
            failed.append(str(error))
        bar.update()

    with tqdm(total=len(todo), desc="runs", unit="run", disable=not todo) as bar, ThreadPoolExecutor(jobs) as pool:
        for waits in (False, True):
            list(pool.map(one, [run for run in todo if (run.earlier is not None) is waits]))
    return failed


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "_", name.lower()).strip("_")


def _has_gpu() -> bool:
    import torch  # not for --help

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
