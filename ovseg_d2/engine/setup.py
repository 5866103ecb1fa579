"""Command line and everything that happens before a job starts: config, device, logs, seeds, data checks."""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.logger import setup_logger

from ovseg_d2.checkpoint.io import atomic_write
from ovseg_d2.data.check import check_dataset
from ovseg_d2.engine.load_config import load_config

logger = logging.getLogger(__name__)

_EXAMPLES = """
examples (any config key can follow as KEY VALUE; its meaning stands in ovseg_d2/config/):
  train on one GPU, or on the CPU if there is none
    {prog} --config-file configs/mask2former/coco_panoptic_R50.yaml
  train on 8 GPUs
    {prog} --config-file FILE --num-gpus 8
  train with 2 processes on the CPU
    {prog} --config-file FILE --num-gpus 2 MODEL.DEVICE cpu
  go on after an interruption
    {prog} --config-file FILE --resume
  evaluate a checkpoint
    {prog} --config-file FILE --eval-only MODEL.WEIGHTS output/model_final.pth
  the same on other datasets
    {prog} --config-file FILE --eval-only MODEL.WEIGHTS output/model_final.pth DATASETS.TEST "('ade20k_panoptic_val',)"
  smaller batch with a learning rate to match, other folder
    {prog} --config-file FILE SOLVER.IMS_PER_BATCH 8 SOLVER.BASE_LR 0.00005 OUTPUT_DIR output/small
  two machines
    (first)  {prog} --config-file FILE --num-gpus 8 --num-machines 2 --machine-rank 0 --dist-url tcp://FIRST:29500
    (second) {prog} --config-file FILE --num-gpus 8 --num-machines 2 --machine-rank 1 --dist-url tcp://FIRST:29500
  the same under torchrun
    torchrun --nproc-per-node 8 {prog} --config-file FILE
"""


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """detectron2's command line.

    Args:
        epilog: examples to show below the help instead of the usual ones.
    """
    parser = argparse.ArgumentParser(
        description="Train a model and evaluate it, or with --eval-only evaluate a checkpoint.",
        epilog=epilog or _EXAMPLES.format(prog=sys.argv[0]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML file of the model and its training")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR, if there is one"
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST, do not train"
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="GPUs of this machine, a process each (default %(default)s); with MODEL.DEVICE cpu, processes",
    )
    parser.add_argument(
        "--num-machines", type=int, default=1, metavar="N", help="machines in all (default %(default)s)"
    )
    parser.add_argument("--machine-rank", type=int, default=0, metavar="I", help="number of this machine, from 0")
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="tcp://HOST:PORT of the machine with rank 0, the same on all; one machine finds a free port",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to change")
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a job, after preparing for it: device, ``OUTPUT_DIR``, logs, seeds, checks of the datasets.

    Args:
        args: of :func:`default_argument_parser`; run in every process.

    Raises:
        FileNotFoundError, ValueError: one line that names the key or the file that is wrong.
    """
    if not args.config_file:
        raise ValueError("--config-file is not given; expected a YAML file, such as configs/ovshapes/fcclip.yaml")
    cfg = load_config(args.config_file, args.opts)
    rank, world_size = comm.get_rank(), comm.get_world_size()
    if not args.eval_only:
        _check_batch_size(cfg, world_size)
    _make_output_dir(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, rank, name="fvcore")
    setup_logger(cfg.OUTPUT_DIR, rank)
    setup_logger(cfg.OUTPUT_DIR, rank, name="ovseg_d2", abbrev_name="ovseg_d2")
    logger.info(f"Process {rank} of {world_size}; {vars(args)}")
    logger.info(f"Environment:\n{collect_env_info()}")

    if cfg.MODEL.DEVICE != (device := available_device(cfg.MODEL.DEVICE)):
        logger.info(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but there is no usable GPU: running on the {device}")
        cfg.MODEL.DEVICE = device
    cfg.freeze()
    if comm.is_main_process() and cfg.OUTPUT_DIR:
        path = f"{cfg.OUTPUT_DIR}/config.yaml"
        with atomic_write(path) as file:
            file.write(cfg.dump().encode())
        logger.info(f"Full config saved to {path}")

    seed_everything(cfg.SEED, rank)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not args.eval_only
    check_dataset(cfg, cfg.DATASETS.TEST if args.eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    return cfg


def available_device(device: str) -> str:
    """``device`` (``MODEL.DEVICE``), or ``cpu`` if it is a GPU and there is none."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"MODEL.DEVICE is {device!r}, expected cuda, cuda:N or cpu") from error
    return "cpu" if kind == "cuda" and not torch.cuda.is_available() else device


def seed_everything(seed: int, rank: int, *, start: int = 0) -> None:
    """Seed Python, numpy and torch; a negative seed leaves them random.

    Args:
        seed: of the run (``SEED``).
        rank: of the process; each gets other numbers.
        start: iteration that a resumed run goes on with; it gets other numbers than the run had at its start.
    """
    if seed < 0:
        return
    seed = (seed + rank + 1000 * start) % 2**32  # numpy takes no larger ones
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _make_output_dir(folder: str) -> None:
    """Make ``OUTPUT_DIR``; a one-line ``ValueError`` if that cannot be, or nothing can be written there."""
    if not folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f"OUTPUT_DIR is {folder!r}, which cannot be made a folder: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"OUTPUT_DIR is {folder!r}, where nothing can be written; expected a folder of your own")


def _check_batch_size(cfg: CfgNode, world_size: int) -> None:
    batch_size = cfg.SOLVER.IMS_PER_BATCH
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch_size}, expected a positive multiple of {world_size} (processes)"
        )
