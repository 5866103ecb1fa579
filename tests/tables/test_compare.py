"""tools/compare.py: the page of all tables, what it says of old and missing rows, and the page of the project."""

import json
import re
from functools import cache

import pytest
import yaml

from tools import compare, row_files, run_table, table_files, table_runs

ROWS = {
    "open": [
        {"name": "first", "chart": "First", "opts": ["SOLVER.MAX_ITER", 5]},
        {"name": "second", "eval_only": True, "chart": "Second"},
        {"name": "third"},
    ],
    "closed": [{"name": "fourth", "chart": "Fourth"}],
}
METRICS = {"open": ["mIoU", "mIoU_seen", "mIoU_unseen", "hIoU"], "closed": ["mIoU", "pACC"]}
SCORES = {
    "open": {"mIoU": 20.0, "mIoU_seen": 24.0, "mIoU_unseen": 5.0, "hIoU": None},
    "closed": {"mIoU": 50.0, "pACC": 9.0},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two tables and results of all rows but ``third``: two seeds of ``first``, one of them by older code."""
    (tmp_path / "some.yaml").write_text("SEED: 1\n")
    (tmp_path / "tables").mkdir()
    row_files.file_settings.cache_clear()
    monkeypatch.setattr(row_files, "ROOT", tmp_path)
    monkeypatch.setattr(row_files, "code_version", lambda: "now")
    for name, rows in ROWS.items():
        table = {
            "title": f"The {name} one",
            "config": "some.yaml",
            "metrics": METRICS[name],
            "seeds": [1],
            "rows": rows,
        }
        (tmp_path / "tables" / f"{name}.yaml").write_text(yaml.safe_dump(table))
        for row in rows:
            for seed in {"first": [1, 3], "third": []}.get(row["name"], [1]):
                run = table_runs.run_of(table, name, row, seed, tmp_path / "output" / name, tmp_path / "results")
                content = {
                    "metrics": {key: v and v + seed for key, v in SCORES[name].items()},
                    "commands": row_files.commands_of(run.record),
                    "settings": row_files.settings_hash(run.record),
                    "code": "before" if seed == 3 else "now",
                    "minutes": 30.0 * seed,
                    "device": "cpu",
                    "threads": 1,
                    "date": "2026-01-01 00:00",
                }
                row_files.write_whole(run.file, json.dumps(content))
    return tmp_path


@pytest.fixture
def run(place, capsys):
    """Compare in ``place``; returns the exit code, the lines of the page and what went to stderr."""

    def run(*flags):
        names = ("tables", "results", "output", "page")
        places = [word for name in names for word in (f"--{name}", str(place / name))]
        code = compare.main([*places, *flags])
        return (
            code,
            (place / "page").read_text().splitlines() if (place / "page").is_file() else [],
            capsys.readouterr()[1],
        )

    return run


def test_page(run, place, monkeypatch):
    code, lines, err = run("--render")
    assert code == 0 and not err
    assert [line for line in lines if line.startswith("|")] == [
        "| | seeds | mIoU | pACC | mIoU_seen | mIoU_unseen | hIoU | minutes |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        "| **The closed one** | | | | | | | |",
        "| fourth | 1 | 51.0 | 10.0 | - | - | - | 30.0 |",
        "| **The open one** | | | | | | | |",
        "| first † | 1, 3 | 22.0 ± 1.4 | - | 26.0 ± 1.4 | 7.0 ± 1.4 | - | 60.0 |",
        "| second | - | 21.0 | - | 25.0 | 6.0 | - | 30.0 |",
    ]
    text = "\n".join(lines)
    assert "4 runs, 3.0 hours in all: 4 on cpu, 1 thread." in text
    assert "† 1 of the runs were made with an older version of the code" in text
    assert lines[-1] == "* The open one: third" and "![Bars of the main rows](images/ovshapes.png)" in lines
    assert "python tools/run_table.py tools/tables/closed.yaml --rows 'fourth' --again" in lines
    picture = (place / "images" / "ovshapes.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    # Where all are old, no row needs a mark.
    monkeypatch.setattr(row_files, "code_version", lambda: "later")
    text = "\n".join(run("--render")[1])
    assert "†" not in text and "All of the runs were made with an older version of the code" in text
    # What a row no longer is, is not shown.
    (place / "some.yaml").write_text("SOLVER: {BASE_LR: 2.0}\n")
    row_files.file_settings.cache_clear()
    code, lines, _ = run("--render")
    assert code == 0 and len([line for line in lines if line.startswith("|")]) == 2 and "images" not in "\n".join(lines)


def test_table_of_a_page_of_its_own(run, place):
    page = place / "open.md"
    page.write_text(f"# Open\n\n{compare.BEGIN}\nold\n{compare.END}\n\nAfter.\n")
    (place / "closed.md").write_text("no place\n")
    assert run("--render")[0] == 0 and run("--render")[0] == 0
    assert page.read_text().splitlines() == [
        "# Open",
        "",
        compare.BEGIN,
        "",
        "| row | seeds | mIoU | mIoU_seen | mIoU_unseen | hIoU |",
        "|---|---|---:|---:|---:|---:|",
        "| first | 1, 3 | 22.0 ± 1.4 | 26.0 ± 1.4 | 7.0 ± 1.4 | - |",
        "| second | - | 21.0 | 25.0 | 6.0 | - |",
        "",
        compare.END,
        "",
        "After.",
    ]
    assert (place / "closed.md").read_text() == "no place\n"
    page.write_text(f"{compare.BEGIN}\nold\n")
    code, _, err = run("--render")
    assert code == 1 and f"{page}: expected '{compare.BEGIN}'" in err and page.read_text().endswith("old\n")


def test_runs_what_is_missing(run, monkeypatch):
    monkeypatch.setattr(compare, "draw", lambda rows, path: None)
    asked = []
    monkeypatch.setattr(table_runs.Run, "start", lambda self: asked.append((self.table, self.row, self.seed)))
    assert run()[0] == 0 and asked == [("open", "third", 1)]
    asked.clear()
    assert run("--rows", "f*", "--again", "--jobs", "1")[0] == 0
    assert asked == [("closed", "fourth", 1), ("open", "first", 1)]
    asked.clear()
    assert run("--render", "--again")[0] == 0 and not asked

    def fail(self):
        raise RuntimeError(f"{self.row} failed")

    monkeypatch.setattr(table_runs.Run, "start", fail)
    code, lines, err = run()
    assert code == 1 and err.splitlines()[-1] == "compare: third failed" and any("| first" in line for line in lines)


def test_bad_input(run, place):
    code, lines, err = run("--rows", "fifth")
    assert (code, lines, err) == (1, [], "compare: --rows 'fifth' matches no row of 2 tables\n")
    broken = place / "results" / "open" / "first-seed3.json"
    broken.write_text("{")
    code, lines, err = run("--render")
    assert code == 1 and not lines and str(broken) in err and len(err.splitlines()) == 1
    for path in (place / "tables").iterdir():
        path.unlink()
    assert run("--render")[2] == f"compare: {place / 'tables'} holds no tables (*.yaml)\n"


def test_the_page_of_the_project(monkeypatch):
    """Its numbers are those of the committed results (``make compare ARGS=--render`` writes it)."""
    monkeypatch.setattr(table_files, "read_table", cache(table_files.read_table))
    paths = sorted((compare.ROOT / "tools" / "tables").glob("*.yaml"))
    rows = [row for path in paths for row in compare.rows_of(path, run_table.RESULTS)]
    metrics = list(dict.fromkeys(name for path in paths for name in table_files.read_table(path)["metrics"]))

    def numbers(text):
        return [line.replace(" †", "") for line in text.splitlines() if re.match(r"\| (?!\*\*)", line)]

    text = (compare.ROOT / "docs" / "ovshapes.md").read_text(encoding="utf-8")
    assert numbers(text) == numbers(compare.page(rows, metrics, "")) and len(numbers(text)) > 2
    assert (compare.ROOT / "docs" / compare.CHART).is_file()
    for path in paths:
        own = compare.ROOT / "docs" / f"{path.stem}.md"
        if own.is_file():
            text = own.read_text(encoding="utf-8")
            part = [row for row in rows if row.table == path.stem]
            assert compare.BEGIN in text
            assert text == compare.with_table(text, part, table_files.read_table(path)["metrics"]), own
    files = {path for path in run_table.RESULTS.rglob("*.json")}
    assert len(files) == sum(len(row.contents) for row in rows), "a file of results belongs to no row as it is now"
