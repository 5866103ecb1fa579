"""What stands for a table, for its settings and for the runs of train_net.py in the tests of this folder."""

import json
import shlex
from pathlib import Path

import yaml

from tools import row_files

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
# All rows and seeds of it, as TrainNet.runs gives them.
ALL = [("a_layer_4", 1), ("a_layer_4", 2), ("a_layer_4", 3), ("another", 7), ("as_it_is", 1)]
# One row after another, with its weights.
WAITING = [
    {"name": "first", "seeds": [1, 2]},
    {"name": "then", "after": "first", "seeds": [1, 2], "eval_only": True, "opts": ["MODEL.WEIGHTS", "{after}/m.pth"]},
]
# Stands for all keys and what they are where nothing sets them.
DEFAULTS = {"SOLVER.MAX_ITER": 90, "SOLVER.BASE_LR": 0.5}
LOG = """\
[11/20 09:00:00] ovseg_d2.engine.setup INFO: Process 0 of 1; of a run before
[11/21 23:00:30] ovseg_d2.engine.setup INFO: Process 0 of 1; {}
a line without a stamp
[11/22 00:13:00] ovseg_d2.engine.evaluate INFO: All metrics
"""


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
