"""ResNets with three convolutions in the stem: those of detectron2's DeepLab, which public checkpoints have."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.projects.deeplab.resnet import DeepLabStem

from ovseg_d2.modeling.backbones.resnet_deep_stem import DeepStem
from tests.helpers import randomise, tiny_cfg


@torch.no_grad()
def test_stem_is_deeplabs():
    ours = randomise(DeepStem(in_channels=3, out_channels=16, norm="BN")).eval()
    theirs = DeepLabStem(in_channels=3, out_channels=16, norm="BN").eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 37, 50)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("freeze_at", [0, 2])
def test_backbone(freeze_at):
    cfg = tiny_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_deep_stem_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    backbone = build_backbone(cfg)
    assert backbone.output_shape()["res5"] == ShapeSpec(channels=128, stride=32)
    outputs = backbone(torch.randn(1, 3, 64, 96))
    assert {name: tuple(x.shape[2:]) for name, x in outputs.items()} == {
        "res2": (16, 24),
        "res3": (8, 12),
        "res4": (4, 6),
        "res5": (2, 3),
    }
    trained = {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == ({"stem", "res2", "res3", "res4", "res5"} if freeze_at == 0 else {"res3", "res4", "res5"})
