"""Hosts of a frozen CLIP, and MAFT on them, as small as they get and with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from ovseg_d2.structures import Vocabulary
from tests.helpers import randomise, tiny_cfg
from tests.modeling.tiny_fcclip import COLOURS, inputs

OTHERS = Vocabulary(names=("tree", "brick", "sand"), is_thing=(False, False, True))
ONE = Vocabulary(names=("red star",), is_thing=(True,))

GENERATORS = ("MaskFormerProposals", "FreeSegProposals", "FCCLIPProposals", "PrecomputedProposals")


def host_cfg(generator: str = "MaskFormerProposals", *, tasks: Sequence[str] = ("semantic", "panoptic")) -> CfgNode:
    """A FrozenCLIP on the tiny ViT CLIP of the package, with ZSSeg's ensemble."""
    cfg = tiny_cfg(tasks=tasks)
    cfg.MODEL.META_ARCHITECTURE = "FrozenCLIP"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = list(CLIP_PIXEL_MEAN), list(CLIP_PIXEL_STD)
    cfg.INPUT.FORMAT = "RGB"
    ovseg = cfg.MODEL.OVSEG
    ovseg.CLIP.NAME, ovseg.CLIP.PRETRAINED = "OVShapes-ViT", ""
    ovseg.TEXT.TEMPLATES = ["a photo of a {}.", "a {} here"]
    ovseg.CROPS.SIZE = 32
    prop = ovseg.PROPOSALS
    prop.NAME, prop.CLASS_HEAD = generator, "embed"
    prop.EMBED_HIDDEN_DIM, prop.INTERACTION_DIM, prop.INTERACTION_HEADS = 40, 48, 4
    ovseg.ENSEMBLE.NAME = "zsseg"
    if generator == "FCCLIPProposals":
        prop.CLIP_NAME = "OVShapes-RN"
    if generator == "PrecomputedProposals":
        prop.CLASS_HEAD, ovseg.ENSEMBLE.NAME = "none", "none"
    return cfg


def maft_cfg(generator: str = "PrecomputedProposals", clip: str = "OVShapes-ViT", **maft: Any) -> CfgNode:
    """MAFT on such a host, with images of 40 x 40 pixels for CLIP."""
    cfg = host_cfg(generator)
    cfg.MODEL.META_ARCHITECTURE = "MAFT"
    ovseg = cfg.MODEL.OVSEG
    ovseg.CLIP.NAME = clip
    ovseg.CLIP.TRAINABLE = "attention"
    ovseg.CLIP.RESIZE, ovseg.CLIP.INPUT_SIZE = "padded_square", 40 if clip == "OVShapes-ViT" else 64
    ovseg.MAFT.START_LAYER = 3
    ovseg.ENSEMBLE.NAME = "none"
    for key, value in maft.items():
        ovseg.MAFT[key] = value
    return cfg


def random_host(cfg: CfgNode | None = None, *, seed: int = 0) -> nn.Module:
    """Random weights everywhere; CLIP's scale as in real ones, so that the classes differ."""
    model = randomise(build_model(cfg or host_cfg()), seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.add_(1.0)
        model.clip.logit_scale.fill_(3.0)
        if hasattr(model.proposals, "mask_decoder"):
            # Masks of both signs that cover something.
            model.proposals.mask_decoder.mask_embed.layers[-1].weight.mul_(3.0)
    return model


def with_masks(batch: list[dict[str, Any]], *, num_masks: int = 3) -> list[dict[str, Any]]:
    """Inputs that bring ``num_masks`` rectangles each, as if from a file."""
    for i, x in enumerate(batch):
        height, width = x["image"].shape[-2:]
        generator = torch.Generator().manual_seed(100 + i)
        x["proposals"] = torch.zeros(num_masks, height, width, dtype=torch.bool)
        for mask in x["proposals"]:
            top, left = (int(torch.randint(0, n // 2, (), generator=generator)) for n in (height, width))
            mask[top : top + height // 2, left : left + width // 2] = True
    return batch


def host_inputs(*sizes: tuple[int, int], vocabulary: Vocabulary = COLOURS, **extra: Any) -> list[dict[str, Any]]:
    """Training inputs with masks, which evaluation and every generator take too."""
    return with_masks(inputs(*sizes, vocabulary=vocabulary, **extra))


@torch.no_grad()
def sem_seg(model: nn.Module, batch: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Semantic scores (K, H, W) of each input."""
    return [result["sem_seg"] for result in model.eval()(batch)]
