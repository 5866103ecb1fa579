"""Checkpoints of runs: saving, finding, falling back, surviving a kill."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ovseg_d2.checkpoint.checkpointer import Checkpointer
from ovseg_d2.checkpoint.io import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def make(folder, value=0.0, **kwargs):
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    return model, Checkpointer(model, str(folder), optimizer=optimizer, **kwargs)


def test_resume_brings_everything_back(tmp_path):
    model, checkpointer = make(tmp_path, 3.0)
    model(torch.ones(1, 2)).sum().backward()
    checkpointer.checkpointables["optimizer"].step()
    checkpointer.save("model_0000004", iteration=4)
    restored, other = make(tmp_path)
    assert other.has_checkpoint() and other.resume() == {"iteration": 4}
    torch.testing.assert_close(restored.weight, model.weight)
    assert other.checkpointables["optimizer"].state_dict()["state"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000004.pth"


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, damage):
    model, checkpointer = make(tmp_path, 1.0)
    checkpointer.save("model_0000001", iteration=1)
    nn.init.constant_(model.weight, 2.0)
    checkpointer.save("model_0000002", iteration=2)
    newest = tmp_path / "model_0000002.pth"
    newest.write_bytes(newest.read_bytes()[:200]) if damage == "truncated" else newest.unlink()
    restored, other = make(tmp_path)
    assert other.resume() == {"iteration": 1} and (restored.weight == 1).all()
    assert "model_0000002.pth" in caplog.text and "resuming from" in caplog.text

    (tmp_path / "model_0000001.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot resume from"):
        make(tmp_path)[1].resume()


def test_keep(tmp_path):
    _, checkpointer = make(tmp_path, keep=2)
    for i in range(4):
        checkpointer.save(f"model_{i:07d}", iteration=i)
    checkpointer.save("model_final", iteration=4)
    assert {p.name for p in tmp_path.glob("*.pth")} == {"model_0000002.pth", "model_0000003.pth", "model_final.pth"}


def test_another_model_is_refused_in_one_line(tmp_path):
    make(tmp_path)[1].save("model_final")
    other = Checkpointer(nn.Linear(3, 2), str(tmp_path))
    with pytest.raises(ValueError, match=r"weight is \(2, 2\) in the file, \(2, 3\) in the model") as error:
        other.resume()
    assert "\n" not in str(error.value)


# A process for each moment of the kill; they are forked, so that imports are paid once.
SAVE_UNTIL_KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from ovseg_d2.checkpoint.checkpointer import Checkpointer

def save_forever(folder, report):
    model = nn.Linear(1500, 1500)
    checkpointer = Checkpointer(model, folder)
    for i in range(1, 10**6):
        nn.init.constant_(model.weight, float(i))
        checkpointer.save(f"model_{i % 3:07d}", iteration=i)
        os.write(report, i.to_bytes(4, "big"))

for folder in sys.argv[1:]:
    os.mkdir(folder)
    saved, report = os.pipe()
    child = os.fork()
    if child == 0:
        save_forever(folder, report)
    os.close(report)
    for _ in range(3):
        reported = os.read(saved, 4)
    time.sleep(0.003 * int(Path(folder).name))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    reported += os.read(saved, 10000)
    Path(folder, "reported").write_text(str(int.from_bytes(reported[-4:], "big")))
"""


def test_kill_in_the_middle_of_a_save_loses_nothing(tmp_path):
    """``kill -9`` at any moment: the last checkpoint that was reported saved, or a newer one, is whole."""
    folders = [tmp_path / str(i) for i in range(10)]
    command = [sys.executable, "-c", SAVE_UNTIL_KILLED, *map(str, folders)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    assert list(tmp_path.glob("*/.model_*.tmp")), "some kills were in the middle of a save"
    for folder in folders:
        reported = int((folder / "reported").read_text())
        named = folder / (folder / "last_checkpoint").read_text()
        assert read_checkpoint(named)["iteration"] >= reported >= 3
        model = nn.Linear(1500, 1500)
        checkpointer = Checkpointer(model, str(folder))
        found = checkpointer.resume()["iteration"]
        assert found >= reported and (model.weight == found).all()
        checkpointer.save("model_0000009", iteration=9)
        assert not list(folder.glob(".model_*")), "the next save removes what the kill left"
