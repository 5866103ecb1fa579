"""tools/row_files.py: the files of results stand for runs, as long as they belong to their rows."""

import json
import os
import shutil

from tests.tables.stubs import ALL, DEFAULTS, LOG
from tools import row_files


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
