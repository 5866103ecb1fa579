"""EVA-CLIP's towers: the project's forward pass against timm's own, on the same modules."""

import pytest
import torch
from torch.nn import functional as F

from ovseg_d2.modeling.clip.eva import ClipEva, timm_names_from_eva_clip
from tests.modeling.clip.test_vit import close
from tests.modeling.clip.tiny_vit import (
    DIM,
    HEADS,
    LAYERS,
    eva_tower,
    random_images,
    random_masks,
    resized_by_hand,
)


@pytest.mark.parametrize("rope", [True, False])
@torch.no_grad()
def test_image_embedding_is_timms(rope):
    tower, images = eva_tower(rope=rope), random_images(32, 32)
    encoder = ClipEva(tower)
    close(encoder(images).image_embeds, tower(images))
    assert encoder.embed_dim == DIM


@torch.no_grad()
def test_layer_scale():
    tower, images = eva_tower(init_values=0.5), random_images(32, 32)
    close(ClipEva(tower)(images).image_embeds, tower(images))


@pytest.mark.parametrize("rope", [True, False])
@torch.no_grad()
def test_other_sizes_equal_a_tower_built_for_them(rope):
    square, native = eva_tower(32, rope=rope), eva_tower((24, 40), rope=rope)
    weights = square.state_dict()
    weights["trunk.pos_embed"] = resized_by_hand(weights["trunk.pos_embed"][0], 4, (3, 5))[None]
    native.load_state_dict(weights)
    images = random_images(27, 47)
    features = ClipEva(square, out_layers=["block1"], pos_align_corners=True)(images)
    close(features.image_embeds, native(images[..., :24, :40]))
    close(features.layers["block1"], native.trunk.forward_intermediates(images[..., :24, :40], indices=[1])[1][0])


@torch.no_grad()
def test_value_embeddings():
    tower, images = eva_tower(), random_images(32, 32)
    x, rotation = tower.trunk._pos_embed(tower.trunk.patch_embed(images))
    *blocks, last = tower.trunk.blocks
    for block in blocks:
        x = block(x, rope=rotation)
    x = x + last.attn.proj(last.attn.norm(last.attn.v_proj(last.norm1(x))))
    x = x + last.mlp(last.norm2(x))
    expected = tower.trunk.head(tower.trunk.norm(x))[:, 1:].mT.unflatten(2, (4, 4))
    close(ClipEva(tower, last_block="value")(images).dense, expected)


@pytest.mark.parametrize("rope", [True, False])
@torch.no_grad()
def test_mask_tokens_equal_one_long_sequence_in_timms_blocks(rope):
    encoder = ClipEva(eva_tower(rope=rope), mask_mode="maskclippp", start_layer=2, pos_align_corners=True)
    encoder.mask_logit_scale.copy_(torch.randn(2, HEADS, generator=torch.Generator().manual_seed(3)))
    images, masks, num_masks = random_images(24, 40), random_masks(3), 3
    features = encoder(images)
    x = torch.cat([features.tokens[:, :1].expand(-1, num_masks, -1), features.tokens], dim=1)
    soft = F.interpolate(masks, size=(3, 5), mode="bilinear", align_corners=False).flatten(2)
    inside = soft > soft.amax(dim=-1, keepdim=True) / 2
    for step, index in enumerate(range(2, LAYERS)):
        bias = torch.zeros(2, HEADS, x.shape[1], x.shape[1])
        bias[..., :, :num_masks] = float("-inf")
        bias[..., :num_masks, num_masks] = float("-inf")
        scale = encoder.mask_logit_scale[1 - step].exp()[:, None, None]
        bias[..., :num_masks, num_masks + 1 :] = torch.where(inside[:, None], soft[:, None] * scale, -100.0)
        block = encoder.blocks[index]
        block.attn.num_prefix_tokens = num_masks + 1  # timm rotates what comes after them
        x = block(x, rope=encoder.rotation((3, 5)), attn_mask=bias)
        block.attn.num_prefix_tokens = 1
    embeds = encoder.encode_masks(features, masks)
    close(embeds, encoder.head(x[:, :num_masks]))
    assert embeds.isfinite().all()
    *_, (_, image) = encoder.mask_states(features, masks, finish_image=True)
    close(image, encoder.token_states(images).last)
    # Images of a batch do not touch each other, whatever the number of masks.
    close(encoder.encode_masks(encoder(images[1:]), masks[1:, 1:]), embeds[1:, 1:])
    features = encoder(images, masks_only=True)
    assert features.image_embeds is None and torch.equal(encoder.encode_masks(features, masks), embeds)


@torch.no_grad()
def test_mixed_precision():
    encoder, images, masks = ClipEva(eva_tower(), mask_mode="maskclippp"), random_images(24, 40), random_masks(3)
    expected = encoder.encode_masks(encoder(images), masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = encoder.encode_masks(encoder(images), masks)
    close(got.float(), expected, tolerance=0.1)


@pytest.mark.parametrize("rope", [True, False])
def test_names_of_eva_clip(rope):
    expected = eva_tower(rope=rope).trunk.state_dict()
    undo = {
        ".attn.norm.": ".attn.inner_attn_ln.",
        ".mlp.norm.": ".mlp.ffn_ln.",
        ".mlp.fc1_g.": ".mlp.w1.",
        ".mlp.fc1_x.": ".mlp.w2.",
        ".attn.q_proj.bias": ".attn.q_bias",
        ".attn.v_proj.bias": ".attn.v_bias",
    }
    if rope:  # the plain feed-forward network has an fc2 in both
        undo[".mlp.fc2."] = ".mlp.w3."
    official = {}
    for key, value in expected.items():
        for ours, theirs in undo.items():
            key = key.replace(ours, theirs)
        official[key] = value
    assert official.keys() != expected.keys() or not rope
    official |= {"rope.freqs_cos": torch.zeros(2), "blocks.0.attn.rope.freqs_sin": torch.zeros(2)}
    renamed = timm_names_from_eva_clip(official)
    assert renamed.keys() == expected.keys()
    assert all(renamed[key] is expected[key] for key in expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"global_pool": "avg"}, "'avg'"),
        ({"num_reg_tokens": 2}, "register"),
        ({"use_post_norm": True, "scale_attn_inner": False}, "EvaBlockPostNorm"),
        ({"rope_type": "mixed"}, "RotaryEmbeddingMixed"),
    ],
)
def test_towers_of_another_make(options, words):
    with pytest.raises(ValueError, match=words):
        ClipEva(eva_tower(**options))
