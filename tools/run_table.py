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
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is there, not that above

from tools import row_files  # noqa: E402
from tools.row_files import COMMAND_FILE, ROOT  # noqa: E402
from tools.table_files import has_one_seed, read_table  # noqa: E402
from tools.table_runs import Run, has_gpu, run_of, runs_of  # noqa: E402

RESULTS = ROOT / "results"


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
    return _work(list(dict.fromkeys(todo)), jobs or (1 if has_gpu() else os.cpu_count() or 1))


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
    rows = {row_files.slug(row["name"]): row for row in table["rows"]}
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


if __name__ == "__main__":
    sys.exit(main())
