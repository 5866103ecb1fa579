"""tools/run_table.py: which runs there are, which are repeated, what fails, and the numbers."""

import shutil
import sys
from pathlib import Path

from tests.tables.stubs import ALL, TABLE, WAITING, option


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


def test_a_metric_that_is_not_there(run):
    code, _, err = run(metrics=["mIoU", "mIoU_unsean"])
    assert code == 1
    assert "run_table: metrics: 'mIoU_unsean' is not among" in err and "which are mIoU, hIoU" in err


def test_a_mean_over_nothing(run, train_net):
    train_net.scores = {"hIoU": None}
    assert "| another | 7 | 70.0 | - |" in run()[1]


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
