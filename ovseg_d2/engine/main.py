"""What ``train_net.py`` does in every process."""

from __future__ import annotations

import argparse

import ovseg_d2.modeling  # noqa: F401  (fills detectron2's registries)
from ovseg_d2.engine.evaluate import Results, evaluate
from ovseg_d2.engine.loading import load_model
from ovseg_d2.engine.setup import setup
from ovseg_d2.engine.trainer import Trainer


def main(args: argparse.Namespace) -> Results:
    """Train, or with ``--eval-only`` evaluate, the model of ``args.config_file``.

    Returns:
        {dataset: {task: {metric: value}}}, percent, in the main process; {} in others.
    """
    cfg = setup(args)
    if args.eval_only:
        model = load_model(cfg)
        return evaluate(cfg, model, extra={"weights": cfg.MODEL.WEIGHTS}, augmented=cfg.TEST.AUG.ENABLED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()
