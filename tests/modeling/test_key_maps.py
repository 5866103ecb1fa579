"""Backbone files of other projects give the same features here."""

import torch
from detectron2.modeling import build_backbone
from torchvision.models import resnet50

from ovseg_d2.checkpoint.convert import convert_state_dict
from tests.helpers import randomise, tiny_cfg


@torch.no_grad()
def test_torchvision_resnet():
    torch.manual_seed(0)
    theirs = randomise(resnet50()).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    cfg = tiny_cfg()
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 64
    backbone = build_backbone(cfg).eval()
    converted, message = convert_state_dict(theirs.state_dict())
    missing, unexpected = backbone.load_state_dict(converted, strict=False)
    assert missing == [] and all(key.endswith("num_batches_tracked") for key in unexpected)
    assert "torchvision" in message and "2 without counterpart dropped (fc.weight" in message
    image = torch.randn(1, 3, 64, 96)
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
    for name, layer in zip(
        ("res2", "res3", "res4", "res5"), (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), strict=True
    ):
        x = layer(x)
        torch.testing.assert_close(backbone(image)[name], x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))
