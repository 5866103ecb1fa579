"""A world of square pictures, and commands on it, in processes of their own or in this one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ovseg_d2.data.datasets.ovshapes_writer import WorldSettings, write_world
from tests.helpers import ovshapes_below

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/ovshapes/mask2former.yaml"
# Small and without chance: no augmentation, no statistics of the batch, every picture of one size (pictures are padded
# to the largest of their batch, and the model sees the padding).
EXACT = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.OVSEG.PROPOSALS.HIDDEN_DIM": 32,
    "MODEL.OVSEG.PROPOSALS.PIXEL_DIM": 32,
    "MODEL.OVSEG.PROPOSALS.MASK_DIM": 32,
    "MODEL.OVSEG.PROPOSALS.NUM_HEADS": 4,
    "MODEL.OVSEG.PROPOSALS.DEC_LAYERS": 1,
    "MODEL.OVSEG.LOSS.NUM_POINTS": 64,
    "MODEL.OVSEG.TEST.OBJECT_MASK_THRESHOLD": 0.0,  # two iterations teach no certainty
    "MODEL.OVSEG.TEST.OVERLAP_THRESHOLD": 0.0,
    "INPUT.PIPELINE": "resize",
    "INPUT.RANDOM_FLIP": "none",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": 64,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.BASE_LR": 0.002,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.MAX_ITER": 2,
    "SEED": 3,
}


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """DETECTRON2_DATASETS with an OVShapes of 8 + 3 pictures of 64 x 64."""
    folder = tmp_path_factory.mktemp("world")
    write_world(str(folder / "ovshapes"), WorldSettings(train=8, val=3, min_size=64, max_size=64))
    return folder


@pytest.fixture(scope="module")
def world_here(world: Path) -> Iterator[Path]:
    """The world is OVShapes in this process, too."""
    with ovshapes_below(world):
        yield world


def command_line(*flags: object, opts: dict[str, object]) -> list[str]:
    """``flags`` on ``CONFIG``, ``EXACT`` and, over them, ``opts``."""
    settings = [word for pair in (EXACT | opts).items() for word in pair]
    return [str(word) for word in ("--config-file", ROOT / CONFIG, *flags, *settings)]


@contextmanager
def own_loggers() -> Iterator[None]:
    """What a job's set-up does to the loggers of this process lasts as long as the context."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "ovseg_d2")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    try:
        yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)


@pytest.fixture(scope="session")
def start(world):
    """Run a program with ``CONFIG``, ``EXACT`` and, over them, ``opts`` on the world; returns the ended process."""

    def start(program: list[object], *flags: object, opts: dict[str, object]) -> subprocess.CompletedProcess:
        environment = os.environ | {"DETECTRON2_DATASETS": str(world), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, program), *command_line(*flags, opts=opts)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)

    return start


@contextmanager
def corrupt(world: Path) -> Iterator[Path]:
    """The first training picture, cut off for as long as the context lasts."""
    image = min((world / "ovshapes" / "train").iterdir())
    content = image.read_bytes()
    image.write_bytes(content[:100])
    try:
        yield image
    finally:
        image.write_bytes(content)
