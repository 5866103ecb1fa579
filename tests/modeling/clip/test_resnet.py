"""The ResNet tower against open_clip's own, and its regions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ovseg_d2.modeling.clip.resnet import ClipResNet
from ovseg_d2.modeling.clip.trainable import apply_policy
from tests.modeling.clip.tiny_clip import RESNET, images, random_open_clip

MODES = ("hard", "soft", "maft")


def encoder(**options: Any) -> ClipResNet:
    return ClipResNet(random_open_clip(RESNET).visual, **options).eval()


@pytest.fixture(scope="module")
def masks() -> torch.Tensor:
    """(2, 4, 70, 99): a box, a soft box, nothing, everything."""
    masks = torch.zeros(2, 4, 70, 99)
    masks[:, 0, :40, 10:70] = 1
    masks[:, 1, 30:, 33:] = 0.8
    masks[:, 3] = 1
    return masks


@torch.no_grad()
def test_equals_open_clip():
    model = random_open_clip(RESNET)
    features = ClipResNet(model.visual, dense="attention").eval()(images(2, 3, 64, 64))
    expected = model.forward_intermediates(images(2, 3, 64, 64), image_output_fmt="NCHW", normalize=False)
    torch.testing.assert_close(features.image_embeds, model.encode_image(images(2, 3, 64, 64)), rtol=1e-5, atol=1e-5)
    for name, layer in zip(("res2", "res3", "res4", "res5"), expected["image_intermediates"][1:], strict=True):
        torch.testing.assert_close(features.layers[name], layer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(70, 99), (33, 64), (64, 64)])
@torch.no_grad()
def test_shapes(size):
    module = encoder(dense="value")
    features = module(images(2, 3, *size))
    for name, shape in module.output_shape().items():
        # Pools round down, convolutions up.
        assert features.layers[name].shape[1] == shape.channels
        assert abs(features.layers[name].shape[2] - size[0] / shape.stride) <= 1
    assert features.image_embeds.shape == (2, module.embed_dim)
    assert features.dense.shape == (2, module.embed_dim, *features.grid)
    assert features.grid == tuple(features.layers["res5"].shape[-2:])


@pytest.mark.parametrize("mask_pooling", MODES)
@torch.no_grad()
def test_batch_equals_single(mask_pooling, masks):
    module, batch = encoder(mask_pooling=mask_pooling), images(2, 3, 70, 99)
    together = module(batch)
    embeds = module.encode_masks(together, masks)
    for i in range(2):
        alone = module(batch[i : i + 1])
        torch.testing.assert_close(alone.image_embeds[0], together.image_embeds[i])
        torch.testing.assert_close(module.encode_masks(alone, masks[i : i + 1])[0], embeds[i])


@pytest.mark.parametrize("mask_pooling", ["hard", "soft"])
@torch.no_grad()
def test_empty_mask_sees_the_whole_image(mask_pooling, masks):
    module = encoder(mask_pooling=mask_pooling)
    embeds = module.encode_masks(module(images(2, 3, 70, 99)), masks)
    assert embeds.isfinite().all()
    torch.testing.assert_close(embeds[:, 2], embeds[:, 3])
    assert (embeds[:, 0] - embeds[:, 3]).abs().max() > 1e-3


@torch.no_grad()
def test_tokens_of_maft_see_themselves_and_their_mask(masks):
    module = encoder(mask_pooling="maft")
    features = module(images(2, 3, 70, 99))
    embeds, tokens = module.encode_masks(features, masks), module.tokens(features.layers["res5"])
    torch.testing.assert_close(embeds[:, 3], features.image_embeds)
    pool = module.tower.attnpool
    torch.testing.assert_close(embeds[:, 2], pool.c_proj(pool.v_proj(tokens[:, 0])))
    soft = nn.functional.interpolate(masks, size=features.grid, mode="bilinear", align_corners=False).flatten(2)
    for i in range(2):
        for j in range(2):
            seen = torch.cat([torch.tensor([True]), soft[i, j] >= 0.5])
            assert 1 < seen.sum() < len(seen)
            torch.testing.assert_close(embeds[i, j], module.pool(tokens[i : i + 1, seen])[0])


@pytest.mark.parametrize("mask_pooling", MODES)
@torch.no_grad()
def test_masks_alone_leave_the_image_unpooled(mask_pooling, masks):
    module, batch = encoder(mask_pooling=mask_pooling, dense="attention"), images(2, 3, 70, 99)
    features = module(batch, masks_only=True)
    assert features.image_embeds is None and features.dense is None and features.grid == module(batch).grid
    assert torch.equal(module.encode_masks(features, masks), module.encode_masks(module(batch), masks))


@pytest.mark.parametrize("mask_pooling", MODES)
@torch.no_grad()
def test_no_masks(mask_pooling):
    module = encoder(mask_pooling=mask_pooling)
    assert module.encode_masks(module(images(2, 3, 64, 64)), torch.zeros(2, 0, 64, 64)).shape == (2, 0, 12)


@pytest.mark.parametrize("mask_pooling", MODES)
@torch.no_grad()
def test_a_region_depends_on_its_own_positions(mask_pooling):
    """Its keys and values are the positions inside; the query, the mean of all, is given."""
    module = encoder(mask_pooling=mask_pooling)
    features = module(images(1, 3, 64, 96))
    left = torch.zeros(1, 1, 2, 3)
    left[..., 0] = 1
    before = module.encode_masks(features, left)
    swapped = features.layers["res5"].clone()
    swapped[..., 1:] = swapped[..., 1:].flip(-1)
    features.layers["res5"] = swapped
    torch.testing.assert_close(module.encode_masks(features, left), before)
    features.layers["res5"] = swapped.flip(-1)
    assert (module.encode_masks(features, left) - before).abs().max() > 1e-3


@torch.no_grad()
def test_logits_are_masks_before_a_sigmoid():
    logits = 4 * images(2, 3, 2, 3, seed=1)
    for mode in MODES:
        module = encoder(mask_pooling=mode)
        features = module(images(2, 3, 64, 96))
        embeds = module.encode_masks(features, logits, from_logits=True)
        torch.testing.assert_close(embeds, module.encode_masks(features, logits.sigmoid()))


def test_mask_logit_scale_trains():
    module = encoder(mask_pooling="soft", mask_logit_scale=-1.0)
    assert module.mask_logit_scale.tolist() == [-1.0] * 4
    masks = torch.rand(1, 3, 64, 96)
    module.encode_masks(module(images(1, 3, 64, 96)), masks).sum().backward()
    assert (module.mask_logit_scale.grad.abs() > 0).all()
    fixed = encoder(mask_pooling="soft", learn_mask_logit_scale=False)
    assert "mask_logit_scale" not in fixed.state_dict() and not hasattr(encoder(), "mask_logit_scale")


@torch.no_grad()
def test_position_table_modes_differ():
    embeds = [
        encoder(pos_mode=mode, pos_align_corners=corners)(images(1, 3, 96, 160)).image_embeds
        for mode in ("bilinear", "bicubic")
        for corners in (False, True)
    ]
    for i in range(4):
        for j in range(i):
            assert (embeds[i] - embeds[j]).abs().max() > 1e-5


def test_checkpointing_changes_nothing():
    """Neither gradients nor the moving statistics, which a second pass would move twice."""
    results = []
    for use_checkpoint in (False, True):
        module = encoder(use_checkpoint=use_checkpoint).train()
        module(images(2, 3, 64, 64)).image_embeds.square().sum().backward()
        results.append((module.state_dict(), {name: p.grad for name, p in module.named_parameters()}))
    torch.testing.assert_close(results[0], results[1])


def test_checkpointing_recomputes(monkeypatch):
    calls = []
    module = encoder(use_checkpoint=True).train()
    module.tower.layer3[0].register_forward_pre_hook(lambda *_: calls.append(1))
    module(images(2, 3, 64, 64)).image_embeds.sum().backward()
    assert len(calls) == 2


def test_frozen_parts_keep_their_statistics():
    module = encoder()
    apply_policy(module, "attention")
    module.train()
    assert module.tower.training and module.tower.attnpool.training
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    apply_policy(module, "full")
    assert all(norm.training for norm in norms)


def test_frozen_tower_keeps_its_statistics():
    module = encoder()
    module.tower.requires_grad_(False)
    module.train()
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)


@pytest.mark.parametrize("option", ["dense", "mask_pooling", "pos_mode"])
def test_unknown_options_are_refused(option):
    with pytest.raises(ValueError, match=f"^CLIP image encoder: {option} is 'x'; expected one of .*[a-z]$"):
        encoder(**{option: "x"})
