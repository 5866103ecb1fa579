"""CLIP's ResNets as backbones: the same maps as the image tower's, and what becomes of their batch norms."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from torch import nn

from ovseg_d2.engine.trainer import replace_sync_batch_norm
from ovseg_d2.modeling.clip.build import build_clip
from tests.helpers import randomise
from tests.modeling.test_backbones import images
from tests.modeling.tiny_backbones import backbone_cfg, write_clip


@pytest.fixture
def cfg(tmp_path):
    return backbone_cfg("ClipResNetBackbone", tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["SyncBN", "BN", "FrozenBN"])
def test_maps_are_those_of_the_tower(cfg, norm):
    """Without the attention pool, whatever kind of norm has the weights."""
    clip = randomise(build_clip(cfg.MODEL.OVSEG.CLIP.NAME, with_text=False)).eval()
    cfg.MODEL.CLIP_RESNET.NORM = norm
    model = build_backbone(cfg).eval()
    missing, unexpected = model.encoder.load_state_dict(clip.visual.state_dict(), strict=False)
    assert not missing and all("attnpool" in name or name.endswith("tracked") for name in unexpected)
    expected = clip.visual(images(53, 75)).layers
    for name, feature in model(images(53, 75)).items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-5, atol=1e-5)


def test_batch_norms(cfg):
    """They train unless they are frozen; on the CPU, SyncBatchNorm becomes BatchNorm and keeps what is frozen."""
    kinds = {"SyncBN": nn.SyncBatchNorm, "BN": nn.BatchNorm2d, "FrozenBN": FrozenBatchNorm2d}
    models = {}
    for norm, kind in kinds.items():
        cfg.MODEL.CLIP_RESNET.NORM = norm
        models[norm] = model = build_backbone(cfg)
        assert isinstance(model.encoder.tower.bn1, kind)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert ("encoder.tower.bn1.weight" in trainable) == (norm != "FrozenBN")
        assert "encoder.tower.conv1.weight" in trainable and not any("attnpool" in name for name in trainable)

    before = models["BN"].encoder.tower.bn1.running_mean.clone()
    models["BN"].train()(images(32, 32))
    assert not torch.equal(models["BN"].encoder.tower.bn1.running_mean, before)

    models["SyncBN"].encoder.tower.bn1.requires_grad_(False)
    plain = replace_sync_batch_norm(models["SyncBN"]).encoder.tower
    assert type(plain.bn1) is nn.BatchNorm2d
    assert not plain.bn1.weight.requires_grad and plain.bn2.weight.requires_grad


def test_frozen(cfg):
    cfg.MODEL.OVSEG.CLIP.TRAINABLE = "frozen"
    model = build_backbone(cfg).train()
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    assert not model.encoder.tower.bn1.training


def test_recomputed_activations_change_nothing(cfg):
    grads = []
    for use_checkpoint in (False, True):
        cfg.MODEL.OVSEG.CLIP.USE_CHECKPOINT = use_checkpoint
        model = randomise(build_backbone(cfg)).train()
        model(images(32, 48))["res5"].square().mean().backward()
        grads.append(model.encoder.tower.conv1.weight.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads)


def test_errors_name_their_keys(cfg, tmp_path):
    cfg.MODEL.CLIP_RESNET.NORM = "GN"
    with pytest.raises(ValueError, match="MODEL.CLIP_RESNET.NORM: got 'GN'; expected one of SyncBN, BN, FrozenBN"):
        build_backbone(cfg)
    vit = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    cfg.MODEL.OVSEG.CLIP.NAME = write_clip(tmp_path, vit)
    with pytest.raises(ValueError, match="MODEL.OVSEG.CLIP.NAME: .*has no ResNet of CLIP"):
        build_backbone(cfg)
