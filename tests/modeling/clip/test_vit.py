"""CLIP's ViT: the project's forward pass against open_clip's own, on the same modules."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ovseg_d2.modeling.clip.image_prompts import DeepImagePrompts
from ovseg_d2.modeling.clip.trainable import split_qkv
from ovseg_d2.modeling.clip.vit import ClipViT
from tests.helpers import randomise
from tests.modeling.clip.tiny_vit import (
    DIM,
    HEADS,
    LAYERS,
    PATCH,
    WIDTH,
    random_images,
    random_masks,
    resized_by_hand,
    vit_tower,
)


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("options", [{}, {"ls_init_value": 0.5}, {"no_ln_pre": True}])
@torch.no_grad()
def test_image_embedding_is_open_clips(options, split):
    tower, images = vit_tower(**options), random_images(32, 32)
    expected = tower(images)
    if split:
        for block in tower.transformer.resblocks:
            split_qkv(block.attn)
    close(ClipViT(tower)(images).image_embeds, expected)


@pytest.mark.parametrize("last_block", ["none", "full", "value", "value_cls", "sclip", "clearclip"])
@torch.no_grad()
def test_image_embedding_comes_from_the_ordinary_path(last_block):
    tower, images = vit_tower(), random_images(32, 32)
    features = ClipViT(tower, last_block=last_block)(images)
    close(features.image_embeds, tower(images))
    assert (features.dense is None) == (last_block == "none")


@pytest.mark.parametrize(("last_block", "out_layer", "runs"), [("value_cls", 0, 3), ("value", 3, 4), ("full", 0, 4)])
@torch.no_grad()
def test_without_an_image_embedding_the_last_block_runs_where_it_is_needed(last_block, out_layer, runs, monkeypatch):
    tower, images, blocks = vit_tower(), random_images(32, 32), []
    options = {"last_block": last_block, "out_layers": [f"block{out_layer}"]}
    expected = ClipViT(tower, **options)(images)
    encoder = ClipViT(tower, image_embedding=False, **options)
    ordinary = encoder._block
    monkeypatch.setattr(encoder, "_block", lambda index, *args: blocks.append(index) or ordinary(index, *args))
    features = encoder(images)
    assert blocks == list(range(runs)) and features.image_embeds is None
    close((features.dense, features.layers), (expected.dense, expected.layers))


@torch.no_grad()
def test_other_sizes_equal_a_tower_built_for_them():
    square, native = vit_tower(32), vit_tower((24, 40))
    weights = square.state_dict()
    weights["positional_embedding"] = resized_by_hand(weights["positional_embedding"], 4, (3, 5))
    native.load_state_dict(weights)
    encoder = ClipViT(square, out_layers=["block0", "block2"], pos_align_corners=True)
    # The 3 rows and 7 columns that fill no patch are left out, as by the convolution.
    images = random_images(27, 47)
    features = encoder(images)
    expected = native.forward_intermediates(images[..., :24, :40], indices=[0, 2])
    close(features.image_embeds, expected["image_features"])
    assert features.grid == (3, 5) and features.dense.shape == (2, DIM, 3, 5)
    for name, layer in zip(("block0", "block2"), expected["image_intermediates"], strict=True):
        close(features.layers[name], layer)
        assert encoder.output_shape()[name].channels == layer.shape[1]
        assert encoder.output_shape()[name].stride == PATCH


def dense_by_hand(tower, images, last_block):
    """The variants written out with whole attention matrices."""
    x = tower._embeds(images)
    *blocks, last = tower.transformer.resblocks
    for block in blocks:
        x = block(x)
    attn = last.attn
    q, k, v = F.linear(last.ln_1(x), attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    out = v
    if last_block in ("full", "sclip", "clearclip"):
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))
        scale = (WIDTH // HEADS) ** -0.5
        qq, kk, qk = ((a @ b.mT * scale).softmax(dim=-1) for a, b in ((q, q), (k, k), (q, k)))
        weights = {"full": qk, "sclip": qq + kk, "clearclip": qq}[last_block]
        out = (weights @ v).transpose(1, 2).flatten(2)
    out = attn.out_proj(out)
    if last_block != "clearclip":
        out = out + (x[:, :1] if last_block == "value_cls" else x)
        out = out + last.mlp(last.ln_2(out))
    return (tower.ln_post(out) @ tower.proj)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))


@pytest.mark.parametrize("last_block", ["full", "value", "value_cls", "sclip", "clearclip"])
@torch.no_grad()
def test_dense_embeddings(last_block):
    tower, images = vit_tower(), random_images(32, 32)
    close(ClipViT(tower, last_block=last_block)(images).dense, dense_by_hand(tower, images, last_block))


@torch.no_grad()
def test_class_embedding_added_twice():
    images, tower = random_images(32, 32), vit_tower()
    got = ClipViT(tower, extra_class_embedding=True)(images).image_embeds
    assert not torch.allclose(got, tower(images), atol=1e-3)
    tower.class_embedding.mul_(2)
    close(got, tower(images))


def masked_encoder(mask_mode, start_layer=2, **options):
    encoder = ClipViT(vit_tower(), mask_mode=mask_mode, start_layer=start_layer, pos_align_corners=True, **options)
    if mask_mode == "maskclippp":
        scale = torch.randn(LAYERS - start_layer, HEADS, generator=torch.Generator().manual_seed(3))
        encoder.mask_logit_scale.data.copy_(scale)
    return encoder.eval()


@pytest.mark.parametrize("start_layer", range(LAYERS))
@pytest.mark.parametrize("mask_mode", ["maskclippp", "maft"])
@torch.no_grad()
def test_mask_tokens_equal_one_long_sequence_in_open_clips_blocks(mask_mode, start_layer):
    encoder, images, masks = masked_encoder(mask_mode, start_layer), random_images(24, 40), random_masks(3)
    features = encoder(images)
    x, num_masks = features.tokens, 3
    tokens = x[:, :1].expand(-1, num_masks, -1)
    image = x if mask_mode == "maskclippp" else x[:, 1:]
    x = torch.cat([tokens, image], dim=1)
    soft = F.interpolate(masks, size=(3, 5), mode="bilinear", align_corners=False).flatten(2)
    for step, index in enumerate(range(start_layer, LAYERS)):
        bias = torch.zeros(2, HEADS, x.shape[1], x.shape[1])
        bias[..., :, :num_masks] = float("-inf")  # nobody sees a mask token
        if mask_mode == "maskclippp":
            scale = encoder.mask_logit_scale[LAYERS - 1 - start_layer - step].exp()[:, None, None]
            inside = soft > soft.amax(dim=-1, keepdim=True) / 2
            bias[..., :num_masks, num_masks] = float("-inf")  # nor do mask tokens see the class token
            bias[..., :num_masks, num_masks + 1 :] = torch.where(inside[:, None], soft[:, None] * scale, -100.0)
        else:
            bias[..., :num_masks, num_masks:] = torch.where(soft >= 0.5, 0.0, float("-inf"))[:, None]
            bias[..., range(num_masks), range(num_masks)] = 0  # but itself
        x = encoder.blocks[index](x, attn_mask=bias.flatten(0, 1))
    close(encoder.encode_masks(features, masks), encoder.head(x[:, :num_masks]))
    *_, (_, image) = encoder.mask_states(features, masks, finish_image=True)
    close(image, x[:, num_masks:])


@pytest.mark.parametrize("mask_mode", ["maskclippp", "maft"])
@torch.no_grad()
def test_masks_alone_leave_the_image_unfinished(mask_mode):
    encoder, images = masked_encoder(mask_mode, out_layers=["block1", "block3"]), random_images(24, 40)
    masks, calls = random_masks(3), []
    for index, block in enumerate(encoder.blocks):
        block.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    features = encoder(images, masks_only=True)
    assert calls == [0, 1] and features.image_embeds is None and features.dense is None
    whole = encoder(images)
    close(features.layers["block1"], whole.layers["block1"])
    assert torch.equal(encoder.encode_masks(features, masks), encoder.encode_masks(whole, masks))
    with pytest.raises(ValueError, match="mask_mode is 'none'; expected one of maskclippp, maft"):
        ClipViT(vit_tower())(images, masks_only=True)


@pytest.mark.parametrize("mask_mode", ["maskclippp", "maft"])
@pytest.mark.parametrize("count", [1, 300])
@torch.no_grad()
def test_any_number_of_masks(mask_mode, count):
    encoder, masks = masked_encoder(mask_mode), random_masks(count, (25, 41))
    features = encoder(random_images(24, 40), masks_only=True)
    embeds = encoder.encode_masks(features, masks)
    assert embeds.shape == (2, count, DIM) and embeds.isfinite().all()
    close(encoder.encode_masks(features, masks[:, count // 2 : count // 2 + 1]), embeds[:, count // 2 : count // 2 + 1])


def test_no_masks_still_connect_all_that_trains():
    """Other processes wait for gradients of the same parameters."""
    encoder = masked_encoder("maft", last_block="none")
    embeds = encoder.encode_masks(encoder(random_images(24, 40), masks_only=True), torch.zeros(2, 0, 24, 40))
    assert embeds.shape == (2, 0, DIM)
    embeds.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in encoder.parameters())


@torch.no_grad()
def test_pixels_that_fill_no_patch():
    """ViT-L/14 at 480 pixels: 34 patches, and 4 pixels that the masks still count."""
    tower = vit_tower(42, patch_size=14)
    encoder = ClipViT(tower, mask_mode="maft", start_layer=1, pos_align_corners=True)
    images = random_images(480, 480, count=1)
    features = encoder(images, masks_only=True)
    assert features.grid == (34, 34) and features.tokens.shape == (1, 1 + 34 * 34, WIDTH)
    close(encoder(images[..., :476, :476], masks_only=True).tokens, features.tokens)
    masks = random_masks(2, (480, 480), images=1)
    grid_masks = F.interpolate(masks, size=(34, 34), mode="bilinear", align_corners=False)
    close(encoder.encode_masks(features, masks), encoder.encode_masks(features, grid_masks))


@torch.no_grad()
def test_masks_of_maskclippp_leave_the_image_as_it_is():
    encoder, images = masked_encoder("maskclippp"), random_images(24, 40)
    *_, (_, image) = encoder.mask_states(encoder(images), random_masks(3), finish_image=True)
    close(image, encoder.token_states(images).last)


@torch.no_grad()
def test_full_masks_of_maskclippp_see_all_patches_alike():
    encoder, images = masked_encoder("maskclippp"), random_images(24, 40)
    features = encoder(images)
    full, empty = torch.ones(2, 1, 24, 40), torch.zeros(2, 1, 24, 40)
    close(encoder.encode_masks(features, full), encoder.encode_masks(features, empty))


@pytest.mark.parametrize("mask_mode", ["maskclippp", "maft"])
@torch.no_grad()
def test_masks_are_independent_of_each_other_and_of_other_images(mask_mode):
    encoder, images, masks = masked_encoder(mask_mode), random_images(24, 40), random_masks(5)
    features = encoder(images)
    embeds = encoder.encode_masks(features, masks)
    assert embeds.shape == (2, 5, DIM) and embeds.isfinite().all()  # the last mask is empty
    assert not torch.allclose(embeds[:, 0], embeds[:, 1], atol=1e-3)
    order = torch.tensor([3, 1, 4, 0, 2])
    close(encoder.encode_masks(features, masks[:, order]), embeds[:, order])
    close(encoder.encode_masks(encoder(images[1:]), masks[1:, 2:3]), embeds[1:, 2:3])
    logits = torch.randn(masks.shape, generator=torch.Generator().manual_seed(4))
    from_logits = encoder.encode_masks(features, logits, from_logits=True)
    close(from_logits, encoder.encode_masks(features, logits.sigmoid()))
    assert encoder.encode_masks(features, masks[:, :0]).shape == (2, 0, DIM)


@pytest.mark.parametrize("mask_mode", ["maskclippp", "maft"])
def test_checkpointing_changes_no_gradient(mask_mode):
    images, masks, gradients = random_images(24, 40), random_masks(3), []
    for use_checkpoint in (False, True):
        encoder = masked_encoder(mask_mode, use_checkpoint=use_checkpoint, last_block="value").train()
        features = encoder(images)
        loss = features.dense.square().mean() + encoder.encode_masks(features, masks).square().mean()
        (loss + features.image_embeds.square().mean()).backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)


@pytest.mark.parametrize("mask_mode", ["maskclippp", "maft"])
@torch.no_grad()
def test_mixed_precision(mask_mode):
    encoder, images, masks = masked_encoder(mask_mode), random_images(24, 40), random_masks(3)
    expected = encoder.encode_masks(encoder(images), masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = encoder.encode_masks(encoder(images), masks)
    close(got.float(), expected, tolerance=0.1)


def test_scales_of_masks_are_parameters_or_a_buffer():
    names = dict(masked_encoder("maskclippp").named_parameters())
    assert names["mask_logit_scale"].shape == (LAYERS - 2, HEADS)
    fixed = ClipViT(vit_tower(), mask_mode="maskclippp", learn_mask_logit_scale=False, mask_logit_scale=-4.0)
    assert "mask_logit_scale" not in fixed.state_dict()
    assert fixed.start_layer == LAYERS - 3 and (fixed.mask_logit_scale == -4).all()
    assert "mask_logit_scale" not in dict(masked_encoder("maft").named_parameters())


def test_stochastic_depth_only_in_training():
    encoder, images = ClipViT(vit_tower(), drop_path_rate=0.9), random_images(32, 32)
    close(encoder.eval()(images).image_embeds, encoder.tower(images))
    torch.manual_seed(0)
    encoder.train()
    assert not torch.allclose(encoder(images).image_embeds, encoder.tower(images), atol=1e-3)


@torch.no_grad()
def test_image_prompts_are_replaced_before_every_block():
    tower, images = vit_tower(), random_images(24, 40)
    prompts = DeepImagePrompts(num_layers=LAYERS, num_tokens=5, dim=WIDTH, patch_size=PATCH)
    encoder = ClipViT(tower, prompts=randomise(prompts, 5), out_layers=["block1"], pos_align_corners=True).eval()
    x, grid = encoder.embed(images)
    for index, block in enumerate(tower.transformer.resblocks):
        new = prompts.proj(prompts.embeddings[index]).expand(2, -1, -1)
        x = block(torch.cat([x[:, :1], new, x[:, -15:]], dim=1))
        if index == 1:
            expected = x[:, -15:].mT.unflatten(2, grid)
    features = encoder(images)
    close(features.layers["block1"], expected)
    x = encoder.head(prompts.last_norm(x))
    close(features.image_embeds, x[:, 0])
    close(features.dense, x[:, -15:].mT.unflatten(2, grid))


@torch.no_grad()
def test_image_prompts_end_where_their_layers_end():
    prompts = DeepImagePrompts(num_layers=1, num_tokens=5, dim=WIDTH, patch_size=PATCH)
    states = ClipViT(vit_tower(), prompts=prompts).eval().token_states(random_images(32, 32))
    assert states.last.shape == (2, 17, WIDTH)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"out_layers": ["block4"]}, "out_layers.*'block4'.*block3"),
        ({"last_block": "values"}, "last_block.*'values'.*value_cls"),
        ({"mask_mode": "mask"}, "mask_mode.*'mask'.*maft"),
        ({"start_layer": 2}, "start_layer is 2.*mask_mode is 'none'"),
        ({"mask_mode": "maft", "start_layer": 4}, "start_layer is 4; expected -4 to 3"),
        ({"mask_mode": "maft", "prompts": nn.Identity()}, "prompts"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        ClipViT(vit_tower(), **options)


def test_bad_towers_and_inputs():
    with pytest.raises(ValueError, match="'avg'"):
        ClipViT(vit_tower(pool_type="avg"))
    with pytest.raises(ValueError, match="CustomResidualAttentionBlock"):
        ClipViT(vit_tower(qk_norm=True, block_type="custom"))
    encoder = ClipViT(vit_tower())
    with pytest.raises(ValueError, match="patches are 8"):
        encoder(random_images(7, 40))
    with pytest.raises(ValueError, match="mask_mode is 'none'"):
        encoder.encode_masks(encoder(random_images(32, 32)), random_masks(2, (32, 32)))
