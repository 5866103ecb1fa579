"""``train_net.py`` that also writes the losses of every iteration to ``OUTPUT_DIR/losses.json``.

With ``--kill-in-save N`` as its first words it kills itself, as ``kill -9`` would, halfway through its N-th checkpoint.
"""

import argparse
import io
import json
import os
import signal
import sys
from pathlib import Path

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

import ovseg_d2.modeling  # noqa: F401  (registers the models)
from ovseg_d2.engine import Trainer, default_argument_parser, launch, one_line_errors, setup


class Recorder(HookBase):
    """Writes the averaged losses that the trainer stores, behind those of the part that is resumed."""

    def __init__(self, file: Path, *, resume: bool) -> None:
        self.file = file
        self.losses: list[dict[str, float]] = json.loads(file.read_text()) if resume else []

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        # Older detectron2 stores the value alone, newer ones (value, iteration).
        values = {name: value[0] if isinstance(value, tuple) else value for name, value in latest.items()}
        self.losses.append({name: value for name, value in values.items() if "loss" in name})
        self.file.write_text(json.dumps(self.losses))


def kill_in_save(count: int) -> None:
    """Let the ``count``-th ``torch.save`` from now on write one half and end the process."""
    save, calls = torch.save, []

    def save_or_die(content, file):
        calls.append(file)
        if len(calls) < count:
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_or_die


def main(args: argparse.Namespace) -> None:
    cfg = setup(args)
    trainer = Trainer(cfg)
    if comm.is_main_process():
        trainer.register_hooks([Recorder(Path(cfg.OUTPUT_DIR, "losses.json"), resume=args.resume)])
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[0] == "--kill-in-save":
        kill_in_save(int(words[1]))
        words = words[2:]
    with one_line_errors():
        launch(main, default_argument_parser().parse_args(words))
