#!/usr/bin/env python
"""Every method on OVShapes: run what has no results yet, and write one table and one chart of all results.

The tables of the methods' own pages are written, too: docs/TABLE.md has that of tools/tables/TABLE.yaml between two
comments.

    python tools/compare.py                      # all tables of tools/tables; what `make compare` does
    python tools/compare.py --render             # only write the pages and docs/images/ovshapes.png
    python tools/compare.py --rows 'start layer 4' --again
    python tools/compare.py --stale              # run anew what an older version of the code made

Runs, and what makes one missing, are those of tools/run_table.py, which also takes over runs of other checkouts. An
interrupted comparison goes on where it was: every run leaves its file in results/ when it ends.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is there, not that above

from tools import row_files, run_table, table_files, table_runs  # noqa: E402
from tools.row_files import ROOT  # noqa: E402

OLDER = "†"
#: Between these two lines of a method's page stands its table.
BEGIN, END = "<!-- written by tools/compare.py -->", "<!-- end of what is written -->"
CHART = Path("images", "ovshapes.png")
PAGE = """\
# Every method on OVShapes

OVShapes is the generated world that comes with the project: 72 classes, of which 18 are not named in training. Its tiny
CLIPs and its masks come along, too, so that all of this can be made without a download. The numbers compare the parts
of a method, and how soon methods learn: iterations, sizes of pictures and where the masks are from differ between them
(see `configs/ovshapes/`), so this is no ranking, and it says nothing of real pictures.

One command makes this page; it runs the rows that have no results yet:

```bash
make compare
```

Each row and seed has its file, `results/TABLE/ROW-seedN.json`: all metrics, the command, hashes of the settings and of
the code, minutes, threads, date. A row whose command or settings have changed is run anew. To run any row again, by its
name, or with `--seeds 2 3` instead of `--again` for more seeds:

```bash
{example}
```

{chart}Percent, on 200 pictures: mean and standard deviation of the seeds where there are several (seeds `-`: nothing
is trained). Minutes are those of a run from its start to the end of its evaluation, with as many runs side by side as
there are cores.

{table}

{made}
"""


@dataclass(frozen=True)
class Row:
    """A row of a table, and the contents of its files, a seed each.

    ``closed``: the table's models are trained on all classes, so that it does not tell seen from unseen ones.
    """

    table: str
    title: str
    name: str
    chart: str
    seeds: str
    closed: bool
    contents: list[dict[str, Any]]

    def values(self, metric: str) -> list[float]:
        found = [content["metrics"].get(metric) for content in self.contents]
        return [value for value in found if value is not None]


def rows_of(path: Path, results: Path) -> list[Row]:
    """The rows of a table with whatever results they have, also of seeds beyond the table's.

    Raises:
        ValueError: the table, a configuration or a file of results cannot be read.
    """
    table = table_files.read_table(path)
    rows = []
    for row in table["rows"]:
        start = f"{row_files.slug(row['name'])}-seed"
        files = (results / path.stem).glob(f"{start}*.json")
        seeds = sorted(int(file.stem.removeprefix(start)) for file in files)
        output = ROOT / "output" / "tables" / path.stem
        found = {seed: table_runs.run_of(table, path.stem, row, seed, output, results).content() for seed in seeds}
        found = {seed: content for seed, content in found.items() if content}
        one_seed = table_files.has_one_seed(row)
        contents = list(found.values())[:1] if one_seed else list(found.values())
        numbers = "-" if one_seed else ", ".join(str(seed) for seed in found)
        closed = "mIoU_seen" not in table["metrics"]
        rows.append(Row(path.stem, table["title"], row["name"], row.get("chart", ""), numbers, closed, contents))
    return rows


def page(rows: Sequence[Row], metrics: Sequence[str], code: str) -> str:
    """The whole page.

    Args:
        rows: of all tables, in their order.
        metrics: the columns.
        code: version of the code as it is; what another one made is marked, unless all is.
    """
    done = [row for row in rows if row.contents]
    mixed = any(content["code"] == code for row in done for content in row.contents)
    lines = _head("", [*metrics, "minutes"])
    for i, row in enumerate(done):
        if i == 0 or done[i - 1].title != row.title:
            lines.append(f"| **{row.title}** |" + " |" * (len(metrics) + 2))
        minutes = statistics.mean(content["minutes"] for content in row.contents)
        mark = f" {OLDER}" * (mixed and any(content["code"] != code for content in row.contents))
        lines.append(f"{_line(row, metrics, mark)} {minutes:.1f} |")
    trained = next((row for row in done if row.seeds != "-"), rows[0])
    example = f"python tools/run_table.py tools/tables/{trained.table}.yaml --rows '{trained.name}' --again"
    chart = f"![Bars of the main rows]({CHART.as_posix()})\n\n" if any(row.chart for row in done) else ""
    return PAGE.format(example=example, chart=chart, table="\n".join(lines), made=_made(rows, code))


def with_table(text: str, rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """The text of a method's page with the table of ``rows`` in its place; as it is without such a place.

    Raises:
        ValueError: the place has no end.
    """
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if bool(begin) != bool(end):
        raise ValueError(f"expected {BEGIN!r} and, below it, {END!r}, each on a line of its own")
    if not begin:
        return text
    done = [row for row in rows if row.contents]
    lines = [*_head("row", metrics), *(_line(row, metrics) for row in done)]
    return f"{before}{begin}\n" + "\n".join(lines) + f"\n\n{end}{after}"


def _head(title: str, columns: Sequence[str]) -> list[str]:
    return [f"| {title and f'{title} '}| seeds | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]


def _line(row: Row, metrics: Sequence[str], mark: str = "") -> str:
    cells = [run_table.cell(row.values(metric)) for metric in metrics]
    return f"| {row.name}{mark} | {row.seeds} | {' | '.join(cells)} |"


def _made(rows: Sequence[Row], code: str) -> str:
    """What the runs cost, which are of older code, and which rows have none."""
    contents = [content for row in rows for content in row.contents]
    hours = sum(content["minutes"] for content in contents) / 60
    machines = Counter(_machine(content) for content in contents)
    parts = [
        f"{len(contents)} runs, {hours:.1f} hours in all: "
        + ", ".join(f"{count} on {machine}" for machine, count in machines.most_common())
        + "."
    ]
    older = sum(content["code"] != code for content in contents)
    if older:
        which = f"{OLDER} {older}" if older < len(contents) else "All"
        parts.append(
            f"{which} of the runs were made with an older version of the code, and the same settings; "
            "`python tools/compare.py --stale` makes them anew."
        )
    missing = [row for row in rows if not row.contents]
    if missing:
        titles = list(dict.fromkeys(row.title for row in missing))
        parts += ["Rows that have not been run:"]
        parts.append(
            "\n".join(f"* {title}: {'; '.join(row.name for row in missing if row.title == title)}" for title in titles)
        )
    return "\n\n".join(parts)


def _machine(content: dict[str, Any]) -> str:
    threads = content["threads"]
    return content["device"] if threads is None else f"{content['device']}, {threads} thread{'s' * (threads != 1)}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """A bar chart of the rows that have a name for it: best on top, those that train on all classes below."""
    chosen = sorted(
        (row for row in rows if row.chart and row.values("mIoU")), key=lambda row: -statistics.mean(row.values("mIoU"))
    )
    open_rows = [row for row in chosen if not row.closed]
    closed = [row for row in chosen if row.closed]
    bars = [
        (open_rows, "mIoU_seen", "seen classes", "C0", -0.2, 0.4),
        (open_rows, "mIoU_unseen", "unseen classes", "C1", 0.2, 0.4),
        (closed, "mIoU", "all classes, trained on all", "C7", 0.0, 0.4),
    ]
    figure = Figure(figsize=(8, 1.2 + 0.36 * len(chosen)), layout="constrained")
    axes = figure.subplots()
    for part, metric, label, colour, shift, height in bars:
        part = [row for row in part if row.values(metric)]
        if not part:
            continue
        values = [row.values(metric) for row in part]
        places = [(open_rows + closed).index(row) + shift for row in part]
        spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        whiskers = [spread or float("nan") for spread in spreads]  # none for a single seed
        means = [statistics.mean(v) for v in values]
        axes.barh(places, means, height, xerr=whiskers, color=colour, label=label, error_kw={"capsize": 2, "lw": 0.8})
        for place, mean, spread in zip(places, means, spreads, strict=True):
            axes.annotate(
                f"{mean:.1f}", (mean + spread, place), (3, 0), textcoords="offset points", va="center", size=7
            )
    axes.set_yticks(range(len(chosen)), [row.chart for row in open_rows + closed])
    axes.invert_yaxis()
    axes.set_xlabel("mIoU (percent)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=table_files.TABLES, help="folder of the tables")
    parser.add_argument("--rows", default="*", metavar="PATTERN", help="run only rows whose name matches")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--stale", action="store_true", help="run rows anew that an older version of the code made")
    parser.add_argument("--again", action="store_true", help="run all chosen rows anew")
    parser.add_argument("--jobs", type=int, help="runs side by side (default: CPU cores; 1 with a GPU)")
    parser.add_argument("--output", type=Path, default=Path("output/tables"), help="folder of the tables' runs")
    parser.add_argument("--results", type=Path, default=run_table.RESULTS, help="folder of the results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "ovshapes.md", help="page to write")
    args = parser.parse_args(argv)
    failed: list[str] = []
    try:
        tables = {path: table_files.read_table(path) for path in sorted(args.tables.glob("*.yaml"))}
        if not tables:
            raise ValueError(f"{args.tables} holds no tables (*.yaml)")
        runs = {
            path: table_runs.runs_of(
                table, path.stem, (args.output / path.stem).resolve(), args.results, seeds=None, pattern=args.rows
            )
            for path, table in tables.items()
        }
        if not any(runs.values()):
            raise ValueError(f"--rows {args.rows!r} matches no row of {len(tables)} tables")
        for path, table in {} if args.render else tables.items():
            failed += _complete(path, table, runs[path], args)
        rows_by_table = {path: rows_of(path, args.results) for path in tables}
        rows = [row for part in rows_by_table.values() for row in part]
        metrics = list(dict.fromkeys(name for table in tables.values() for name in table["metrics"]))
        row_files.write_whole(args.page, page(rows, metrics, row_files.code_version()))
        if any(row.chart and row.contents for row in rows):
            draw(rows, args.page.parent / CHART)
        for path, part in rows_by_table.items():
            write_table(args.page.parent / f"{path.stem}.md", part, tables[path]["metrics"])
        sys.stdout.write(f"{args.page}: {sum(bool(row.contents) for row in rows)} of {len(rows)} rows\n")
    except (ValueError, OSError) as error:
        failed.append(str(error))
    for message in failed:
        sys.stderr.write(f"compare: {message}\n")
    return 1 if failed else 0


def write_table(path: Path, rows: Sequence[Row], metrics: Sequence[str]) -> None:
    """Write :func:`with_table` to a method's page, if there is one.

    Raises:
        ValueError: the table's place has no end.
    """
    if not path.is_file():
        return
    try:
        text = with_table(path.read_text(encoding="utf-8"), rows, metrics)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    row_files.write_whole(path, text)


def _complete(path: Path, table: dict[str, Any], runs: list[table_runs.Run], args: argparse.Namespace) -> list[str]:
    """Messages of what failed: the other tables go on."""
    try:
        return run_table.complete(table, runs, jobs=args.jobs, stale=args.stale, again=args.again)
    except RuntimeError as error:
        return [f"{path.name}: {error}"]


if __name__ == "__main__":
    sys.exit(main())
