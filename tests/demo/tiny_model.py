"""A Mask2Former with random weights that runs in milliseconds, and a dataset that names its classes."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from ovseg_d2.engine.load_config import load_config

DATASET = "demo_tests_three_classes"
CLASSES = ("grass", "cat", "dog")

CONFIG = {
    "MODEL": {
        "META_ARCHITECTURE": "Mask2Former",
        "DEVICE": "cpu",
        "WEIGHTS": "",
        "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 0},
        "RESNETS": {
            "DEPTH": 50,
            "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
            "STEM_OUT_CHANNELS": 8,
            "RES2_OUT_CHANNELS": 8,
            "WIDTH_PER_GROUP": 8,
        },
        "SEM_SEG_HEAD": {"NUM_CLASSES": 3},
        "OVSEG": {
            "PROPOSALS": {
                "NUM_QUERIES": 6,
                "HIDDEN_DIM": 32,
                "PIXEL_DIM": 32,
                "MASK_DIM": 32,
                "NUM_HEADS": 2,
                "ENC_LAYERS": 1,
                "ENC_FFN_DIM": 32,
                "DEC_LAYERS": 2,
                "DEC_FFN_DIM": 32,
            },
            "TEST": {
                "TASKS": ["semantic", "panoptic", "instance"],
                "OBJECT_MASK_THRESHOLD": 0.0,
                "OVERLAP_THRESHOLD": 0.0,
            },
        },
    },
    "DATASETS": {"TRAIN": [DATASET], "TEST": [DATASET]},
    "INPUT": {"MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 128, "FORMAT": "RGB"},
}


def write_tiny_model(folder: Path) -> list[str]:
    """Writes ``tiny.yaml`` and ``tiny.pth`` and returns the demo's arguments that name them."""
    if DATASET not in DatasetCatalog.list():
        DatasetCatalog.register(DATASET, list)
    MetadataCatalog.get(DATASET).set(
        stuff_classes=list(CLASSES),
        stuff_colors=[(20, 160, 40), (230, 60, 60), (60, 60, 230)],
        thing_classes=list(CLASSES[1:]),
        thing_dataset_id_to_contiguous_id={1: 1, 2: 2},
    )
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    torch.manual_seed(0)
    model = build_model(load_config(folder / "tiny.yaml"))
    torch.save(model.state_dict(), folder / "tiny.pth")
    return ["--config-file", str(folder / "tiny.yaml"), "--opts", "MODEL.WEIGHTS", str(folder / "tiny.pth")]
