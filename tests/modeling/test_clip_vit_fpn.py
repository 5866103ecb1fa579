"""The pyramid on CLIP's ViT."""

import json

import pytest
import torch
from detectron2.modeling import build_backbone

from ovseg_d2.modeling.backbones.clip_vit_fpn import ClipViTFPN
from ovseg_d2.modeling.clip.vit import ClipViT
from tests.helpers import randomise, tiny_cfg
from tests.modeling.clip.tiny_vit import PATCH, WIDTH, random_images, vit_tower


def backbone() -> ClipViTFPN:
    encoder = ClipViT(vit_tower(), out_layers=[f"block{i}" for i in range(4)], last_block="none", pos_mode="bilinear")
    return randomise(ClipViTFPN(encoder=encoder, norm="BN")).eval()


@torch.no_grad()
def test_shapes_are_as_declared():
    model, (height, width) = backbone(), (48, 80)
    maps, shapes = model(random_images(height, width)), model.output_shape()
    assert list(maps) == list(shapes) == ["res2", "res3", "res4", "res5"]
    for name, feature in maps.items():
        stride = shapes[name].stride
        assert feature.shape == (2, shapes[name].channels, height // stride, width // stride), name
    assert [shape.stride for shape in shapes.values()] == [2, 4, 8, 16]
    assert {shape.channels for shape in shapes.values()} == {WIDTH}
    assert model.size_divisibility == 2 * PATCH


@torch.no_grad()
def test_each_map_comes_from_its_block():
    model, images = backbone(), random_images(32, 32)
    layers = model.encoder(images).layers
    maps = model.pyramid(layers)
    for i, name in enumerate(maps):
        changed = model.pyramid({**layers, f"block{i}": layers[f"block{i}"].roll(1, dims=2)})
        assert [other for other in maps if not torch.equal(changed[other], maps[other])] == [name]
    assert torch.equal(maps["res4"], model.fpn3(layers["block2"]))


def vit_cfg(tmp_path, **vision):
    sizes = {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8}
    config = {
        "embed_dim": 12,
        "vision_cfg": {**sizes, **vision},
        "text_cfg": {"context_length": 9, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1},
    }
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(config))
    cfg = tiny_cfg()
    cfg.MODEL.BACKBONE.NAME = "ClipViTFPN"
    cfg.MODEL.OVSEG.CLIP.NAME = str(path)
    cfg.MODEL.OVSEG.CLIP.TRAINABLE = "full"
    cfg.MODEL.CLIP_VIT_FPN.OUT_BLOCKS = [0, 1, 2, 3]
    cfg.MODEL.CLIP_VIT_FPN.NORM = "BN"
    return cfg


def test_from_config_every_trainable_parameter_gets_a_gradient(tmp_path):
    model = randomise(build_backbone(vit_cfg(tmp_path))).train()
    torch.manual_seed(0)
    weights = torch.randn(4)
    maps = model(random_images(32, 48)).values()
    sum(weight * feature.square().mean() for weight, feature in zip(weights, maps, strict=True)).backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trainable.items() if p.grad is None] == []
    assert "encoder.tower.conv1.weight" in trainable and "encoder.tower.proj" not in trainable
    assert model.encoder.extra_class_embedding and model.encoder.pos_mode == "bilinear"
    assert model.encoder.drop_rates[-1] == pytest.approx(0.1)


def test_frozen(tmp_path):
    cfg = vit_cfg(tmp_path)
    cfg.MODEL.OVSEG.CLIP.TRAINABLE = "frozen"
    model = build_backbone(cfg)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        "fpn1",
        "fpn2",
        "fpn3",
        "fpn4",
    }


def test_errors_name_their_keys(tmp_path):
    cfg = vit_cfg(tmp_path)
    cfg.MODEL.CLIP_VIT_FPN.OUT_BLOCKS = [1, 2, 3]
    with pytest.raises(ValueError, match="MODEL.CLIP_VIT_FPN.OUT_BLOCKS: 3 blocks .*expected 4"):
        build_backbone(cfg)
    for blocks in ([0, 1, 2, 2], [0, 1, 3, 2], [-1, 0, 1, 3], [0, 1, 2, 4]):
        cfg.MODEL.CLIP_VIT_FPN.OUT_BLOCKS = blocks
        with pytest.raises(ValueError, match="MODEL.CLIP_VIT_FPN.OUT_BLOCKS: .*expected four blocks in order"):
            build_backbone(cfg)
    cfg = vit_cfg(tmp_path, layers=[1, 1, 1, 1], width=8, patch_size=None)
    with pytest.raises(ValueError, match="MODEL.OVSEG.CLIP.NAME: .*no ViT"):
        build_backbone(cfg)
