"""What several tests need: a tiny configuration, random weights and random inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Instances
from torch import nn

import ovseg_d2.modeling  # noqa: F401  (registers the models)
from ovseg_d2.config import add_ovseg_config
from ovseg_d2.data.datasets import dataset_root, register_ovshapes
from ovseg_d2.structures import Vocabulary


def tiny_cfg(num_classes: int = 5, tasks: Sequence[str] = ("semantic", "panoptic", "instance")) -> CfgNode:
    """Mask2Former with a ResNet-50 of a sixteenth of its width and two decoder layers, on the CPU."""
    cfg = get_cfg()
    add_ovseg_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.META_ARCHITECTURE = "Mask2Former"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = num_classes
    cfg.DATASETS.TRAIN = ()
    proposals = cfg.MODEL.OVSEG.PROPOSALS
    proposals.NUM_QUERIES = 6
    proposals.HIDDEN_DIM = proposals.PIXEL_DIM = proposals.MASK_DIM = 32
    proposals.NUM_HEADS = 4
    proposals.ENC_LAYERS, proposals.DEC_LAYERS = 1, 2
    proposals.ENC_FFN_DIM = proposals.DEC_FFN_DIM = 32
    cfg.MODEL.OVSEG.LOSS.NUM_POINTS = 24
    cfg.MODEL.OVSEG.TEST.TASKS = list(tasks)
    cfg.MODEL.OVSEG.TEST.OBJECT_MASK_THRESHOLD = 0.0
    cfg.MODEL.OVSEG.TEST.OVERLAP_THRESHOLD = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 8
    return cfg


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in every parameter: zeros and ones of an initialisation hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(fan_in, 1) ** 0.5)
    return module


def numbered_vocabulary(num_classes: int, num_things: int) -> Vocabulary:
    """``class 0``, ``class 1``, ...: things first."""
    names = tuple(f"class {i}" for i in range(num_classes))
    return Vocabulary(names=names, is_thing=tuple(i < num_things for i in range(num_classes)))


def random_input(size: tuple[int, int], *, num_classes: int, num_masks: int, seed: int = 0) -> dict[str, Any]:
    """A mapper's output: a random image with ``num_masks`` rectangles."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    masks = torch.zeros(num_masks, height, width, dtype=torch.bool)
    for mask in masks:
        top, left = (int(torch.randint(0, n // 2, (), generator=generator)) for n in size)
        mask[top : top + height // 3 + 1, left : left + width // 3 + 1] = True
    instances = Instances(size)
    instances.gt_classes = torch.randint(0, num_classes, (num_masks,), generator=generator)
    instances.gt_masks = BitMasks(masks)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {
        "image": image,
        "height": height,
        "width": width,
        "image_id": seed,
        "instances": instances,
        "vocabulary": numbered_vocabulary(num_classes, max(num_classes - 2, 1)),
    }


@contextmanager
def ovshapes_below(root: str | Path) -> Iterator[None]:
    """OVShapes is that below ``root`` as long as the context lasts."""
    _register_ovshapes_anew(str(root))
    try:
        yield
    finally:
        _register_ovshapes_anew(dataset_root())


def _register_ovshapes_anew(root: str) -> None:
    for name in [name for name in DatasetCatalog.list() if name.startswith("ovshapes_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_ovshapes(root)
