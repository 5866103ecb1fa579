"""timm's ViT below the pyramid."""

import pytest
import torch
from detectron2.modeling import build_backbone

from tests.helpers import randomise
from tests.modeling.test_backbones import images
from tests.modeling.tiny_backbones import backbone_cfg


@pytest.fixture
def cfg(tmp_path):
    return backbone_cfg("TimmViTFPN", tmp_path)


@torch.no_grad()
def test_maps_are_those_of_timm(cfg):
    """At the size of the position table timm's own forward gives the blocks' outputs."""
    model = randomise(build_backbone(cfg)).eval()
    x = images(160, 160)
    blocks = model.trunk.forward_intermediates(x, indices=[1, 2, 4, 5], intermediates_only=True)
    expected = model.pyramid(dict(zip(model.layers, blocks, strict=True)))
    for name, feature in model(x).items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_positions_are_resized(cfg):
    """Another size sees the table, too: without it the maps of a constant image would be constant."""
    model = randomise(build_backbone(cfg)).eval()
    feature = model(torch.ones(1, 3, 64, 96))["res4"]
    assert (feature - feature[..., :1, :1]).abs().max() > 1e-3


def test_stochastic_depth_and_recomputing(cfg):
    cfg.MODEL.TIMM_VIT_FPN.DROP_PATH_RATE = 0.3
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in build_backbone(cfg).trunk.blocks]
    assert rates == pytest.approx([0.3 * i / 5 for i in range(6)])
    cfg.MODEL.TIMM_VIT_FPN.DROP_PATH_RATE = 0.0
    grads = []
    for use_checkpoint in (False, True):
        cfg.MODEL.TIMM_VIT_FPN.USE_CHECKPOINT = use_checkpoint
        model = randomise(build_backbone(cfg)).train()
        model(images(32, 48))["res5"].square().mean().backward()
        grads.append(model.trunk.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("NAME", "vit_huge_nonsense", "MODEL.TIMM_VIT_FPN.NAME: timm has no architecture 'vit_huge_nonsense'"),
        ("NAME", "vit_small_patch16_384.augreg_in21k", "timm has no architecture .*weights are named by .*PRETRAINED"),
        ("NAME", "resnet18", "MODEL.TIMM_VIT_FPN.NAME: resnet18 is a ResNet; expected one of timm's Vision"),
        ("OUT_BLOCKS", [0, 1, 5], "MODEL.TIMM_VIT_FPN.OUT_BLOCKS: 3 blocks .*expected 4"),
        ("OUT_BLOCKS", [0, 1, 2, 3], r"MODEL.TIMM_VIT_FPN.OUT_BLOCKS: \[0, 1, 2, 3\]; expected .*last of them 5"),
        ("OUT_BLOCKS", [0, 1, 5, 6], r"MODEL.TIMM_VIT_FPN.OUT_BLOCKS: \[0, 1, 5, 6\]; expected"),
    ],
)
def test_errors_name_their_keys(cfg, key, value, message):
    cfg.MODEL.TIMM_VIT_FPN[key] = value
    with pytest.raises(ValueError, match=message):
        build_backbone(cfg)
