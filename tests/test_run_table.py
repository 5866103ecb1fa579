"""tools/run_table.py: which runs there are, which are repeated, what fails, and the numbers of the table."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "run_table.py"
TABLE = {
    "title": "what",
    "config": "base.yaml",
    "metrics": ["mIoU", "hIoU"],
    "seeds": [1, 2, 3],
    "rows": [
        {"name": "as it is", "eval_only": True},
        {"name": "a layer, 4", "opts": ["MODEL.OVSEG.MAFT.START_LAYER", 4]},
        {"name": "another", "config": "other.yaml", "seeds": [7]},
    ],
}


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("run_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_table"] = module
    spec.loader.exec_module(module)
    return module


def option(command, key):
    """The value that follows a word of a command."""
    return command[command.index(key) + 1]


class TrainNet:
    """Stands for train_net.py: writes results that depend on the seed, fails where it is told to."""

    def __init__(self):
        self.calls, self.failing, self.scores = [], set(), {}

    def __call__(self, command, **kwargs):
        command = list(command)
        if "train_net.py" not in command:
            return self.prepare(command)
        self.calls.append(command)
        folder, seed = Path(option(command, "OUTPUT_DIR")), int(option(command, "SEED"))
        kwargs["stdout"].write("words of the run\n")
        if folder.parent.name in self.failing:
            return 3
        scores = {"mIoU": 10.0 * seed, "hIoU": 5.0, **self.scores}
        results = {"ds": {"sem_seg": scores}, "other": {"sem_seg": {"mIoU": 0.0, "hIoU": 0.0}}}
        (folder / "results.json").write_text(json.dumps({"model": "MAFT", "results": results}))
        return 0

    def prepare(self, command):
        self.calls.append(command)
        if command[1] == "touch":
            Path(command[2]).touch()
        return int(command[1] == "fail")

    def runs(self):
        """(row's folder, seed) of the calls so far, which are forgotten."""
        found = sorted((Path(option(c, "OUTPUT_DIR")).parent.name, int(option(c, "SEED"))) for c in self.calls)
        self.calls.clear()
        return found


@pytest.fixture
def train_net(tool, monkeypatch):
    stub = TrainNet()
    monkeypatch.setattr(tool.subprocess, "call", stub)
    return stub


@pytest.fixture
def run(tool, train_net, tmp_path, capsys):
    """Run a table; returns the exit code, what was printed and what went to stderr."""

    def run(*flags, **changes):
        path = tmp_path / "table.yaml"
        path.write_text(yaml.safe_dump(TABLE | changes))
        code = tool.main([str(path), "--output", str(tmp_path / "out"), "--jobs", "2", *flags])
        return code, *capsys.readouterr()

    return run


ALL = [("a_layer_4", 1), ("a_layer_4", 2), ("a_layer_4", 3), ("another", 7), ("as_it_is", 1)]


def test_runs_and_numbers(run, train_net, tmp_path):
    code, out, _ = run()
    assert code == 0
    by_row = {Path(option(c, "OUTPUT_DIR")).parent.name: c for c in train_net.calls}
    assert train_net.runs() == ALL
    assert "--eval-only" in by_row["as_it_is"] and "--eval-only" not in by_row["a_layer_4"]
    assert option(by_row["a_layer_4"], "--config-file") == "base.yaml"
    assert option(by_row["a_layer_4"], "MODEL.OVSEG.MAFT.START_LAYER") == "4"
    assert option(by_row["another"], "--config-file") == "other.yaml"
    # Options of train_net.py stand before the keys.
    assert by_row["as_it_is"].index("--eval-only") < by_row["as_it_is"].index("SEED")
    assert out.splitlines() == [
        "| what | seeds | mIoU | hIoU |",
        "|---|---|---:|---:|",
        "| as it is | - | 10.0 | 5.0 |",
        "| a layer, 4 | 1, 2, 3 | 20.0 ± 10.0 | 5.0 ± 0.0 |",
        "| another | 7 | 70.0 | 5.0 |",
    ]
    assert (tmp_path / "out" / "table.md").read_text() == out
    assert "words of the run" in (tmp_path / "out" / "another" / "seed7" / "log_of_command.txt").read_text()


def test_finished_runs_are_not_repeated(run, train_net):
    first = run()[1]
    train_net.calls.clear()
    code, out, _ = run()
    assert code == 0 and out == first and train_net.runs() == []


def test_a_changed_row_alone_is_made_anew(run, train_net):
    run()
    train_net.calls.clear()
    rows = [dict(row) for row in TABLE["rows"]]
    rows[2]["opts"] = ["SOLVER.MAX_ITER", 5]
    assert run(rows=rows)[0] == 0 and train_net.runs() == [("another", 7)]
    # A further seed adds to those that are there.
    rows[1]["seeds"] = [1, 2, 3, 4]
    assert run(rows=rows)[0] == 0 and train_net.runs() == [("a_layer_4", 4)]


def test_a_run_without_results_is_repeated(run, train_net, tmp_path):
    run()
    train_net.calls.clear()
    (tmp_path / "out" / "a_layer_4" / "seed2" / "results.json").unlink()
    assert run()[0] == 0 and train_net.runs() == [("a_layer_4", 2)]


def test_rows_and_seeds_of_the_command_line(run, train_net):
    code, out, _ = run("--rows", "*layer*", "--seeds", "2", "5")
    assert code == 0 and train_net.runs() == [("a_layer_4", 2), ("a_layer_4", 5)]
    assert "| a layer, 4 | 2, 5 | 35.0 ± 21.2 |" in out and "another" not in out
    code, _, err = run("--rows", "*layers*")
    assert code == 1 and err == "run_table: --rows '*layers*' matches none of the 3 rows\n"


def test_a_failed_run_is_reported_and_the_others_go_on(run, train_net, tmp_path):
    train_net.failing = {"a_layer_4"}
    code, out, err = run()
    assert code == 1 and train_net.runs() == ALL
    assert "| as it is |" in out and "| another |" in out and "a layer" not in out
    messages = [line for line in err.splitlines() if line.startswith("run_table: ")]
    log = tmp_path / "out" / "a_layer_4" / "seed2" / "log_of_command.txt"
    assert len(messages) == 3 and f"run_table: row 'a layer, 4', seed 2: exit status 3, see {log}" in messages
    train_net.failing = set()
    assert run()[0] == 0 and train_net.runs() == ALL[:3]


def test_results_of_a_former_command_do_not_stand_for_a_failed_one(run, train_net):
    run()
    rows = [dict(row) for row in TABLE["rows"]]
    rows[2]["opts"] = ["SOLVER.MAX_ITER", 5]
    train_net.failing = {"another"}
    code, out, _ = run(rows=rows)
    assert code == 1 and "another" not in out
    # Nor when the row is what it was.
    train_net.calls.clear()
    train_net.failing = set()
    assert "| another | 7 |" in run()[1] and train_net.runs() == [("another", 7)]


def test_preparations(run, train_net, tmp_path, monkeypatch, tool):
    made = tmp_path / "masks.jsonl"
    steps = [{"makes": str(made), "run": f"python touch '{made}'"}]
    assert run("--rows", "another", prepare=steps)[0] == 0
    assert train_net.calls[0] == [sys.executable, "touch", str(made)] and len(train_net.calls) == 2
    train_net.calls.clear()
    assert run("--rows", "another", prepare=steps)[0] == 0 and train_net.calls == []
    for word in ("fail", "nothing"):
        steps = [{"makes": str(tmp_path / "absent"), "run": f"python {word}"}]
        code, _, err = run(prepare=steps)
        assert code == 1 and f"run_table: python {word} failed, or did not make" in err
    assert not any("train_net.py" in call for call in train_net.calls)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "unknown key 'seed'; allowed are config, metrics, prepare, rows, seeds, title"),
        (
            {"rows": [{"name": "x", "option": []}]},
            "row 'x': unknown key 'option'; allowed are after, config, eval_only, name",
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


def test_missing_keys(tool, tmp_path, capsys):
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump({key: TABLE[key] for key in ("title", "rows", "config")}))
    assert tool.main([str(path)]) == 1
    assert capsys.readouterr().err == f"run_table: {path}: no metrics, seeds\n"
    for text, message in (("- a\n", "is no table"), ("", "is no table"), ("a: [", "is no plain YAML")):
        path.write_text(text)
        assert tool.main([str(path)]) == 1
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1
    assert tool.main([str(tmp_path / "absent.yaml")]) == 1
    assert "absent.yaml" in capsys.readouterr().err


def test_a_metric_that_is_not_there(run):
    code, _, err = run(metrics=["mIoU", "mIoU_unsean"])
    assert code == 1
    assert "run_table: metrics: 'mIoU_unsean' is not among" in err and "which are mIoU, hIoU" in err


def test_a_mean_over_nothing(run, train_net):
    train_net.scores = {"hIoU": None}
    assert "| another | 7 | 70.0 | - |" in run()[1]


WAITING = [
    {"name": "first", "seeds": [1, 2]},
    {"name": "then", "after": "first", "seeds": [1, 2], "eval_only": True, "opts": ["MODEL.WEIGHTS", "{after}/m.pth"]},
]


def test_rows_that_wait_for_another(run, train_net, tmp_path):
    code, out, _ = run(rows=WAITING)
    assert code == 0 and "| then | 1, 2 | 15.0 ± 7.1 |" in out
    folders = [Path(option(c, "OUTPUT_DIR")).parent.name for c in train_net.calls]
    assert folders[:2] == ["first"] * 2 and folders[2:] == ["then"] * 2
    for command in train_net.calls[2:]:
        assert option(command, "MODEL.WEIGHTS") == str(
            tmp_path / "out" / "first" / f"seed{option(command, 'SEED')}" / "m.pth"
        )
    train_net.calls.clear()
    assert run(rows=WAITING)[0] == 0 and train_net.runs() == []
    # What comes from an earlier run is made anew with it, and not without it.
    changed = [WAITING[0] | {"opts": ["SOLVER.MAX_ITER", 5]}, WAITING[1]]
    train_net.failing = {"first"}
    code, out, err = run(rows=changed)
    assert code == 1 and train_net.runs() == [("first", 1), ("first", 2)] and "| then |" not in out
    assert "run_table: row 'then', seed 2: row 'first' has not finished" in err
    train_net.failing = set()
    assert run(rows=changed)[0] == 0
    assert train_net.runs() == [("first", 1), ("first", 2), ("then", 1), ("then", 2)]


def test_the_tables_of_the_project(tool):
    tables = sorted((SCRIPT.parent / "tables").glob("*.yaml"))
    for path in tables:
        table = tool.read_table(path)
        runs = tool.runs_of(table, Path("output"), seeds=None, pattern="*")
        assert len({run.folder for run in runs}) == len(runs) >= len(table["rows"])
        configs = {table["config"], *(row["config"] for row in table["rows"] if "config" in row)}
        assert all((tool.ROOT / config).is_file() for config in configs)
