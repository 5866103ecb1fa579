"""tools/run_table.py --import: which runs of another checkout are taken over, and which are not."""

import json
import shutil
from pathlib import Path

from tests.tables.stubs import TABLE


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
