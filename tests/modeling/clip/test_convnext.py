"""The ConvNeXt tower against open_clip's own, and its regions."""

from __future__ import annotations

import pytest
import torch

from ovseg_d2.modeling.clip.convnext import ClipConvNeXt
from tests.modeling.clip.tiny_clip import convnext_config, images, random_open_clip


@pytest.fixture(scope="module")
def tower() -> torch.nn.Module:
    return random_open_clip(convnext_config()).visual


@pytest.mark.parametrize("proj", ["mlp", "linear"])
@torch.no_grad()
def test_equals_open_clip(proj):
    model = random_open_clip(convnext_config(proj))
    module = ClipConvNeXt(model.visual).eval()
    for size in ((64, 64), (75, 101)):
        features = module(images(2, 3, *size))
        expected = model.encode_image(images(2, 3, *size))
        torch.testing.assert_close(features.image_embeds, expected, rtol=1e-5, atol=1e-5)
    layers = model.visual.trunk.forward_intermediates(images(2, 3, 75, 101), intermediates_only=True)
    for name, layer in zip(("res2", "res3", "res4", "res5"), layers, strict=True):
        torch.testing.assert_close(features.layers[name], layer, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_shapes(tower):
    module = ClipConvNeXt(tower, dense=True).eval()
    features = module(images(2, 3, 64, 96))
    assert module.embed_dim == 12
    for name, shape in module.output_shape().items():
        assert features.layers[name].shape == (2, shape.channels, 64 // shape.stride, 96 // shape.stride), name
    assert features.dense.shape == (2, 12, *features.grid) and features.grid == (2, 3)
    assert ClipConvNeXt(tower)(images(1, 3, 64, 64)).dense is None


@torch.no_grad()
def test_regions(tower):
    """All of an image is the image, one cell is that cell's dense embedding, nothing is finite."""
    masks = torch.zeros(2, 3, 2, 3)
    masks[:, 0] = 1
    masks[:, 1, 1, 2] = 1
    for mask_pooling in ("hard", "soft"):
        module = ClipConvNeXt(tower, dense=True, mask_pooling=mask_pooling).eval()
        features = module(images(2, 3, 64, 96))
        embeds = module.encode_masks(features, masks)
        torch.testing.assert_close(embeds[:, 0], features.image_embeds, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(embeds[:, 1], features.dense[:, :, 1, 2], rtol=1e-4, atol=1e-4)
        assert embeds[:, 2].isfinite().all()
        assert module.encode_masks(features, masks[:, :0]).shape == (2, 0, 12)
        features = module(images(2, 3, 64, 96), masks_only=True)
        assert features.image_embeds is None and features.dense is None
        assert torch.equal(module.encode_masks(features, masks), embeds)


@torch.no_grad()
def test_hard_and_soft_differ_on_soft_masks(tower):
    masks = torch.rand(1, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    hard, soft = (ClipConvNeXt(tower, mask_pooling=mode).eval() for mode in ("hard", "soft"))
    features = hard(images(1, 3, 64, 96))
    assert (hard.encode_masks(features, masks) - soft.encode_masks(features, masks)).abs().max() > 1e-3
    torch.testing.assert_close(
        hard.encode_masks(features, masks), soft.encode_masks(features, (masks > 0.5).float()), rtol=1e-4, atol=1e-4
    )
    for module in (hard, soft):
        logits = module.encode_masks(features, masks.logit(), from_logits=True)
        torch.testing.assert_close(logits, module.encode_masks(features, masks), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_batch_equals_single(tower):
    module, batch = ClipConvNeXt(tower).eval(), images(2, 3, 75, 101)
    masks = torch.rand(2, 3, 75, 101)
    together = module(batch)
    for i in range(2):
        alone = module(batch[i : i + 1])
        torch.testing.assert_close(alone.image_embeds[0], together.image_embeds[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            module.encode_masks(alone, masks[i : i + 1])[0],
            module.encode_masks(together, masks)[i],
            rtol=1e-4,
            atol=1e-5,
        )


def test_checkpointing_changes_no_gradient(tower):
    gradients = []
    for use_checkpoint in (False, True):
        tower.zero_grad()
        module = ClipConvNeXt(tower, use_checkpoint=use_checkpoint).train()
        module(images(2, 3, 64, 64)).image_embeds.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_unknown_pooling_is_refused(tower):
    with pytest.raises(ValueError, match="mask_pooling is 'median'; expected one of hard, soft"):
        ClipConvNeXt(tower, mask_pooling="median")
