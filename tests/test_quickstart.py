"""The quickstart from end to end, on a world of a few pictures and for two steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tools import quickstart

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    environment = os.environ | {"DETECTRON2_DATASETS": str(folder / "data")}
    command = ["tools/quickstart.py", "--output", str(folder / "out"), "--world", "6", "3", "--images", "1"]
    command += ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    return command, done, folder / "out"


def test_quickstart(run):
    _, done, out = run
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 2 and results["seconds"] > 0
    chance, baseline, trained = results["rows"].values()
    assert chance["mIoU"] == pytest.approx(100 / 72)
    # Three pictures need not hold every group of classes; what there is lies between 0 and 100.
    for row in (baseline, trained):
        assert set(row) == {"mIoU", "mIoU_seen", "mIoU_unseen", "hIoU", "PQ", "SQ", "RQ", "AP"}
        assert 0 <= row["mIoU"] <= 100 and 0 <= row["PQ"] <= 100
    for name in ("predictions.png", "your_words.png"):
        assert min(Image.open(out / name).size) > 200 and str(out / name) in done.stdout
    assert "hIoU" in done.stdout and "--vocabulary" in done.stdout and "frozen CLIP, no training" in done.stdout


def test_the_second_time_trains_nothing(run, monkeypatch, capsys):
    command, _, out = run
    results, commands = (out / "results.json").read_text(), []
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(out.parent / "data"))
    monkeypatch.setattr(quickstart, "run", lambda *words: commands.append(words[0]))
    monkeypatch.setattr(quickstart, "draw", lambda *args, **kwargs: None)
    monkeypatch.setattr(quickstart, "picture_and_names", lambda: ("picture.jpg", "red star"))
    quickstart.main()
    assert commands == ["datasets/prepare_ovshapes.py", "demo/demo.py"]
    assert "holds a finished training" in capsys.readouterr().out
    assert (out / "results.json").read_text() == results


def test_a_failing_step_ends_it(tmp_path):
    environment = os.environ | {"DETECTRON2_DATASETS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "tools/quickstart.py", "--output", str(tmp_path / "out"), "--world", "0", "-1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0 and "quickstart: stopped" in done.stderr
