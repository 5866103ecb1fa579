"""What the backbones of MTA-CLIP's tables have in common: four maps, any size, and Mask2Former on each of them."""

import pytest
import torch
from detectron2.modeling import build_backbone, build_model

from tests.helpers import numbered_vocabulary, random_input, randomise
from tests.modeling.tiny_backbones import KINDS, backbone_cfg

NAMES = ["res2", "res3", "res4", "res5"]


def images(height, width, *, count=2, seed=1):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=KINDS)
def cfg(request, tmp_path):
    return backbone_cfg(request.param, tmp_path)


def backbone(cfg, seed=0):
    return randomise(build_backbone(cfg), seed).eval()


@torch.no_grad()
def test_shapes_and_strides_are_as_declared(cfg):
    model = backbone(cfg)
    maps, shapes = model(images(64, 96)), model.output_shape()
    assert list(maps) == list(shapes) == NAMES
    assert [shape.stride for shape in shapes.values()] == [4, 8, 16, 32]
    for name, feature in maps.items():
        stride = shapes[name].stride
        assert feature.shape == (2, shapes[name].channels, 64 // stride, 96 // stride), name
        assert feature.isfinite().all() and feature.std() > 0, name
    assert model.size_divisibility == 32


@torch.no_grad()
@pytest.mark.parametrize("size", [(53, 75), (71, 39)])
def test_odd_sizes_and_batches(cfg, size):
    """Sizes that no patch divides give maps of about the declared strides; an image does not know its neighbours."""
    model, x = backbone(cfg), images(*size)
    both = model(x)
    for name, feature in model(x[1:]).items():
        torch.testing.assert_close(feature, both[name][1:], rtol=1e-4, atol=1e-5)
        stride = model.output_shape()[name].stride
        for found, pixels in zip(feature.shape[-2:], size, strict=True):
            # Patches at the right and the bottom that are not whole are cut off, which the finer maps show, too.
            assert pixels / stride - max(32 / stride, 1) < found <= pixels / stride + 1, name


def test_every_trainable_parameter_gets_a_gradient(cfg):
    model = backbone(cfg).train()
    weights = torch.randn(4, generator=torch.Generator().manual_seed(0))
    maps = model(images(64, 64)).values()
    sum(weight * feature.square().mean() for weight, feature in zip(weights, maps, strict=True)).backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) > 20
    assert [name for name, p in trainable.items() if p.grad is None] == []


def test_mask2former(cfg):
    """Trains, and gives results of any size, on each backbone."""
    model = randomise(build_model(cfg)).train()
    batch = [random_input(size, num_classes=5, num_masks=2, seed=i) for i, size in enumerate([(48, 70), (64, 40)])]
    losses = model(batch)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.no_grad():
        results = model.eval()([{**x, "vocabulary": numbered_vocabulary(5, 3)} for x in batch])
    assert [result["sem_seg"].shape for result in results] == [(5, 48, 70), (5, 64, 40)]


def test_on_the_meta_device(cfg):
    with torch.device("meta"):
        model = build_backbone(cfg).eval()
        maps = model(torch.empty(1, 3, 64, 64))
    assert {feature.device.type for feature in maps.values()} == {"meta"}
