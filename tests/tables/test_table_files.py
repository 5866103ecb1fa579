"""tools/table_files.py: what is wrong with a table is said in a line, and the tables of the project are good."""

from pathlib import Path

import pytest
import yaml

from tests.tables.stubs import TABLE
from tools import run_table, table_files, table_runs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "unknown key 'seed'; allowed are config, metrics, prepare, rows, seeds, title"),
        (
            {"rows": [{"name": "x", "option": []}]},
            "row 'x': unknown key 'option'; allowed are after, chart, config, eval_only, name",
        ),
        ({"rows": [{"name": "a b"}, {"name": "A, b"}]}, "two rows are called 'a b'"),
        ({"rows": [{"opts": []}]}, "a row has no name: {'opts': []}"),
        ({"rows": [{"name": "a", "after": "b"}]}, "row 'a' is after 'b', which is no row, or itself waits"),
        ({"rows": [{"name": "a", "after": "a"}]}, "row 'a' is after 'a', which is no row, or itself waits"),
        ({"rows": {"name": "a"}}, "is no table; expected keys with values, and a list of rows"),
    ],
)
def test_bad_tables(run, changes, message):
    code, out, err = run(**changes)
    assert code == 1 and message in err and not out and len(err.splitlines()) == 1


def test_missing_keys(tmp_path, capsys):
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump({key: TABLE[key] for key in ("title", "rows", "config")}))
    assert run_table.main([str(path)]) == 1
    assert capsys.readouterr().err == f"run_table: {path}: no metrics, seeds\n"
    for text, message in (("- a\n", "is no table"), ("", "is no table"), ("a: [", "is no plain YAML")):
        path.write_text(text)
        assert run_table.main([str(path)]) == 1
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1
    assert run_table.main([str(tmp_path / "absent.yaml")]) == 1
    assert "absent.yaml" in capsys.readouterr().err


def test_the_tables_of_the_project():
    tables = sorted((run_table.ROOT / "tools" / "tables").glob("*.yaml"))
    for path in tables:
        table = table_files.read_table(path)
        runs = table_runs.runs_of(table, path.stem, Path("output"), Path("results"), seeds=None, pattern="*")
        assert len({run.folder for run in runs}) == len({run.file for run in runs}) == len(runs) >= len(table["rows"])
        configs = {table["config"], *(row["config"] for row in table["rows"] if "config" in row)}
        assert all((run_table.ROOT / config).is_file() for config in configs)
