"""tools/run_table.py: which runs there are, which are repeated, what fails, the numbers, and their files."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tools import row_files, run_table

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
# Stand for all keys and what they are where nothing sets them.
DEFAULTS = {"SOLVER.MAX_ITER": 90, "SOLVER.BASE_LR": 0.5}


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
        config = DEFAULTS | row_files.settings(shlex.join(command)) | {"MODEL.DEVICE": "cpu", "OUTPUT_DIR": str(folder)}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "log.txt").write_text(LOG)
        scores = {"mIoU": 10.0 * seed, "hIoU": 5.0, "IoU-cat": 1.0, **self.scores}
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


LOG = """\
[11/20 09:00:00] ovseg_d2.engine.setup INFO: Process 0 of 1; of a run before
[11/21 23:00:30] ovseg_d2.engine.setup INFO: Process 0 of 1; {}
a line without a stamp
[11/22 00:13:00] ovseg_d2.engine.evaluate INFO: All metrics
"""


@pytest.fixture
def train_net(monkeypatch):
    stub = TrainNet()
    row_files.file_settings.cache_clear()
    monkeypatch.setattr(run_table.subprocess, "call", stub)
    monkeypatch.setattr(row_files, "resolved", lambda command: DEFAULTS | row_files.settings(command))
    monkeypatch.setattr(row_files, "code_version", lambda root=None: "as it is")
    return stub


@pytest.fixture
def run(train_net, tmp_path, capsys, monkeypatch):
    """Run a table; returns the exit code, what was printed and what went to stderr."""
    for name in ("base", "other"):
        (tmp_path / f"{name}.yaml").write_text(f"DATASETS:\n  TEST: ('{name}',)\n")
    monkeypatch.setattr(row_files, "ROOT", tmp_path)

    def run(*flags, **changes):
        path = tmp_path / "table.yaml"
        path.write_text(yaml.safe_dump(TABLE | changes))
        row_files.file_settings.cache_clear()
        places = ["--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
        code = run_table.main([str(path), *places, "--jobs", "2", *flags])
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


def test_files_stand_for_runs(run, train_net, tmp_path):
    out = run()[1]
    train_net.calls.clear()
    file = tmp_path / "results" / "table" / "a_layer_4-seed2.json"
    before = file.read_text()
    assert json.loads(before) == {
        "table": "table",
        "row": "a layer, 4",
        "seed": 2,
        "dataset": "ds",
        "metrics": {"mIoU": 20.0, "hIoU": 5.0},
        "commands": [
            "python train_net.py --config-file base.yaml MODEL.OVSEG.MAFT.START_LAYER 4 SEED 2 "
            "OUTPUT_DIR output/tables/table/a_layer_4/seed2"
        ],
        "settings": json.loads(before)["settings"],
        "code": "as it is",
        "minutes": 72.5,
        "device": "cpu",
        "threads": 1,
        "date": json.loads(before)["date"],
    }
    assert json.loads(before)["date"].endswith("-11-22 00:13")
    # Without its file, a finished run gives it back; without both, it is repeated.
    file.unlink()
    assert run()[1] == out and train_net.runs() == []
    assert json.loads(file.read_text()) | {"code": "as it is"} == json.loads(before)
    file.unlink()
    (tmp_path / "out" / "a_layer_4" / "seed2" / "results.json").unlink()
    assert run()[1] == out and train_net.runs() == [("a_layer_4", 2)]
    # A clean checkout has the files alone.
    shutil.rmtree(tmp_path / "out")
    assert run()[1] == out and train_net.runs() == []


def test_changed_settings_and_changed_code(run, train_net, tmp_path, monkeypatch):
    run()
    train_net.calls.clear()
    # Another way to write the same, and a default, change no settings.
    (tmp_path / "other.yaml").write_text("DATASETS:\n  TEST: ['other']\n")
    monkeypatch.setitem(DEFAULTS, "SOLVER.NEW", 1)
    assert run()[0] == 0 and train_net.runs() == []
    (tmp_path / "other.yaml").write_text("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 5}\n")
    train_net.failing = {"another"}
    assert "another" not in run()[1]  # the old number is not shown
    train_net.failing, train_net.calls = set(), []
    assert "| another |" in run()[1] and train_net.runs() == [("another", 7)]
    (tmp_path / "base.yaml").write_text("DATASETS:\n  TEST: ['new']\n")  # the other file is based on it
    assert run()[0] == 0 and train_net.runs() == ALL
    # Changed code alone makes nothing anew, unless that is asked for.
    monkeypatch.setattr(row_files, "code_version", lambda root=None: "changed")
    assert run()[0] == 0 and train_net.runs() == []
    assert run("--rows", "another", "--stale")[0] == 0 and train_net.runs() == [("another", 7)]
    assert run("--stale")[0] == 0 and ("another", 7) not in train_net.runs()
    assert run("--stale")[0] == 0 and train_net.runs() == []
    assert run("--rows", "a layer, 4", "--seeds", "3", "--again")[0] == 0 and train_net.runs() == [("a_layer_4", 3)]


def test_import(run, train_net, tmp_path):
    run()
    train_net.calls.clear()
    files = {path.name: path.read_text() for path in (tmp_path / "results" / "table").iterdir()}
    shutil.rmtree(tmp_path / "results")
    elsewhere = tmp_path / "moved"
    shutil.move(tmp_path / "out", elsewhere)
    code, out, err = run("--import", str(elsewhere))
    assert code == 0 and not err and train_net.runs() == [] and not (tmp_path / "out").exists()
    assert sorted(Path(line).name for line in out.splitlines()) == sorted(files)
    for name, text in files.items():  # no code lies around the folder
        found = json.loads((tmp_path / "results" / "table" / name).read_text())
        assert found == json.loads(text) | {"code": None}
    # One run; its file is not replaced by an earlier one.
    file = tmp_path / "results" / "table" / "another-seed7.json"
    file.unlink()
    assert run("--import", str(elsewhere / "another" / "seed7"))[1] == f"{file}\n"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"date": "9999-01-01 00:00"}))
    assert run("--import", str(elsewhere / "another" / "seed7"))[:2] == (0, "")
    code, _, err = run("--import", str(tmp_path / "absent"))
    assert code == 1 and "absent holds no finished run: no command.json" in err


def test_import_of_what_is_no_row(run, train_net, tmp_path):
    run("--rows", "another")
    folder = tmp_path / "out" / "another" / "seed7"
    shutil.rmtree(tmp_path / "results")
    rows = [dict(row) for row in TABLE["rows"]]
    rows[2]["opts"] = ["SOLVER.MAX_ITER", 5]
    code, out, err = run("--import", str(tmp_path / "out"), rows=rows)
    assert code == 1 and not out and f"{folder} was made by python train_net.py" in err and "MAX_ITER 5" in err
    code, _, err = run("--import", str(tmp_path / "out"), rows=rows[:2])
    assert code == 1 and "table has no row 'another'" in err
    # The configuration was another one: a value, a default, or a key that the run did not know.
    (tmp_path / "other.yaml").write_text("DATASETS: {TEST: [new]}\nSOLVER: {NEW: 3, BASE_LR: 0.1}\n")
    code, _, err = run("--import", str(tmp_path / "out"))
    assert code == 1 and len(err.splitlines()) == 1
    assert f"DATASETS.TEST: {folder} was made with ['other'], the row has ['new'] (and 2 more)" in err
    code, _, err = run("--import", str(tmp_path / "out"), "--accept", "DATASETS.TEST", "SOLVER.BASE_LR")
    assert code == 1 and f"SOLVER.NEW: {folder} knows no such key, the row has 3" in err
    keys = ["DATASETS.TEST", "SOLVER.BASE_LR", "SOLVER.NEW"]
    code, out, _ = run("--import", str(tmp_path / "out"), "--accept", *keys)
    assert code == 0 and json.loads(Path(out.strip()).read_text())["accepted"] == keys
    (folder / "log.txt").write_text("words\n")
    code, _, err = run("--import", str(tmp_path / "out"), "--accept", *keys)
    assert code == 1 and "log.txt has no lines that begin with [month/day hour:minute:second]" in err
    (folder / "config.yaml").unlink()
    assert f"{folder} has no config.yaml" in run("--import", str(folder))[2]


def test_bad_files(run, tmp_path):
    run("--rows", "another")
    file = tmp_path / "results" / "table" / "another-seed7.json"
    whole = json.loads(file.read_text())
    for text in ("{", "[]", "{}", json.dumps({key: whole[key] for key in whole if key != "minutes"})):
        file.write_text(text)
        code, _, err = run("--rows", "another")
        assert code == 1 and str(file) in err and "remove it to run the row anew" in err and len(err.splitlines()) == 1
    (tmp_path / "other.yaml").unlink()
    code, _, err = run("--rows", "another")
    assert code == 1 and "other.yaml cannot be read" in err and len(err.splitlines()) == 1


def test_code_of_a_run(tmp_path):
    root, folder = tmp_path / "tree", tmp_path / "tree" / "output" / "run"
    for path in (root / "train_net.py", root / "ovseg_d2" / "a.py", root / "ovseg_d2" / "data" / "b.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1")
        os.utime(path, (0, 0))
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(LOG)
    version = row_files.code_version(root)
    assert row_files.code_of_run(folder) == version
    (root / "ovseg_d2" / "a.pyc").touch()
    assert row_files.code_version(root) == version
    (root / "ovseg_d2" / "a.py").rename(root / "ovseg_d2" / "c.py")
    assert row_files.code_version(root) != version
    # Edited since the run began: nobody knows what made it.
    (root / "ovseg_d2" / "c.py").write_text("x = 2")
    later = row_files.log_span(folder)[0].timestamp() + 1
    os.utime(root / "ovseg_d2" / "c.py", (later, later))
    assert row_files.code_of_run(folder) is None
    shutil.move(folder, tmp_path / "alone")
    assert row_files.code_of_run(tmp_path / "alone") is None


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
    # When the row is what it was, so are its results, but what comes after it would find no weights.
    train_net.calls.clear()
    train_net.failing = set()
    assert "| another | 7 |" in run()[1] and train_net.runs() == []
    after = {"name": "then", "after": "another", "seeds": [7]}
    assert run(rows=[*TABLE["rows"], after])[0] == 0 and train_net.runs() == [("another", 7), ("then", 7)]


def test_preparations(run, train_net, tmp_path):
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


def test_a_row_alone_in_a_clean_checkout(run, train_net, tmp_path):
    """The row that it comes after is run for its weights, and does not stand for itself twice."""
    run(rows=WAITING)
    shutil.rmtree(tmp_path / "out")
    train_net.calls.clear()
    flags = ["--rows", "then", "--seeds", "2", "--again"]
    assert run(*flags, rows=WAITING)[0] == 0 and train_net.runs() == [("first", 2), ("then", 2)]
    assert run(*flags, rows=WAITING)[0] == 0 and train_net.runs() == [("then", 2)]
    # Taken over, too, it is what it is only with that row beside it.
    shutil.rmtree(tmp_path / "results")
    assert len(run("--import", str(tmp_path / "out"), rows=WAITING)[1].splitlines()) == 2
    shutil.rmtree(tmp_path / "out" / "first")
    code, _, err = run("--import", str(tmp_path / "out"), rows=WAITING)
    assert code == 1 and f"{tmp_path / 'out' / 'first' / 'seed2'} holds no finished run" in err


def test_the_tables_of_the_project():
    tables = sorted((run_table.ROOT / "tools" / "tables").glob("*.yaml"))
    for path in tables:
        table = run_table.read_table(path)
        runs = run_table.runs_of(table, path.stem, Path("output"), Path("results"), seeds=None, pattern="*")
        assert len({run.folder for run in runs}) == len({run.file for run in runs}) == len(runs) >= len(table["rows"])
        configs = {table["config"], *(row["config"] for row in table["rows"] if "config" in row)}
        assert all((run_table.ROOT / config).is_file() for config in configs)
