"""``train_net.py`` that also writes the losses of every iteration to ``OUTPUT_DIR/losses.json``.

With ``--kill-after N`` as its first words it kills itself after N iterations as ``kill -9`` would.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.utils import comm

import ovseg_d2.modeling  # noqa: F401  (registers the models)
from ovseg_d2.engine import Trainer, default_argument_parser, launch, one_line_errors, setup


class Recorder(HookBase):
    """Writes the averaged losses that the trainer stores, behind those of the part that is resumed."""

    def __init__(self, file: Path, *, resume: bool, kill_after: int | None) -> None:
        self.file = file
        self.losses: list[dict[str, float]] = json.loads(file.read_text()) if resume else []
        self.kill_after = kill_after

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        # Older detectron2 stores the value alone, newer ones (value, iteration).
        values = {name: value[0] if isinstance(value, tuple) else value for name, value in latest.items()}
        self.losses.append({name: value for name, value in values.items() if "loss" in name})
        self.file.write_text(json.dumps(self.losses))
        if len(self.losses) == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)


def main(args: argparse.Namespace) -> None:
    cfg = setup(args)
    trainer = Trainer(cfg)
    if comm.is_main_process():
        file = Path(cfg.OUTPUT_DIR, "losses.json")
        trainer.register_hooks([Recorder(file, resume=args.resume, kill_after=args.kill_after)])
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


if __name__ == "__main__":
    with one_line_errors():
        words = sys.argv[1:]
        kill_after = int(words[1]) if words[0] == "--kill-after" else None
        args = default_argument_parser().parse_args(words if kill_after is None else words[2:])
        args.kill_after = kill_after
        launch(main, args)
