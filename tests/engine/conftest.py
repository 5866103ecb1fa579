"""A world of square pictures, and commands on it in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/ovshapes/mask2former_quickstart.yaml"
# Small and without chance: no augmentation, no statistics of the batch, every picture of one size (pictures are padded
# to the largest of their batch, and the model sees the padding).
EXACT = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.OVSEG.PROPOSALS.DEC_LAYERS": 1,
    "MODEL.OVSEG.LOSS.NUM_POINTS": 64,
    "INPUT.PIPELINE": "resize",
    "INPUT.RANDOM_FLIP": "none",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": 64,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.MAX_ITER": 2,
}


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """DETECTRON2_DATASETS with an OVShapes of 8 + 3 pictures of 64 x 64."""
    folder = tmp_path_factory.mktemp("world")
    command = [sys.executable, "datasets/prepare_ovshapes.py", "--train", "8", "--val", "3", "--workers", "1"]
    command += ["--min-size", "64", "--max-size", "64"]
    environment = os.environ | {"DETECTRON2_DATASETS": str(folder)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def start(world):
    """Run a program with ``CONFIG``, ``EXACT`` and, over them, ``opts`` on the world; returns the ended process."""

    def start(program: list[object], *flags: object, opts: dict[str, object]) -> subprocess.CompletedProcess:
        environment = os.environ | {"DETECTRON2_DATASETS": str(world), "OMP_NUM_THREADS": "1"}
        settings = [word for pair in (EXACT | opts).items() for word in pair]
        command = [sys.executable, *program, "--config-file", CONFIG, *flags, *settings]
        command = [str(word) for word in command]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)

    return start


def recorded(folder: Path) -> tuple[list[dict[str, float]], dict]:
    """Losses of every iteration and the final metrics of a run."""
    losses = json.loads((folder / "losses.json").read_text())
    return losses, json.loads((folder / "results.json").read_text())["results"]
