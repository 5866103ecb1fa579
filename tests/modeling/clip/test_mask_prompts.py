"""Mask prompts: which patches they replace, in which blocks, and what refuses them."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ovseg_d2.modeling.clip.build import build_clip_from_config
from ovseg_d2.modeling.clip.eva import ClipEva
from ovseg_d2.modeling.clip.image_prompts import MaskPrompts, build_mask_prompts
from ovseg_d2.modeling.clip.vit import ClipViT
from tests.helpers import randomise, tiny_cfg
from tests.modeling.clip.tiny_vit import LAYERS, PATCH, WIDTH, eva_tower, random_images, vit_tower


def crop_masks() -> Tensor:
    """Three masks of 32 x 32 pixels: one pixel, everything, a rectangle off the patches' borders."""
    masks = torch.zeros(3, 32, 32)
    masks[0, 31, 8] = 1
    masks[1] = 1
    masks[2, 5:21, 9:12] = 1
    return masks


def kept_by_hand(masks: Tensor) -> Tensor:
    """(N, L): one patch after the other, its mean rounded up."""
    side = masks.shape[1] // PATCH
    kept = torch.zeros(len(masks), side, side)
    for n in range(len(masks)):
        for i in range(side):
            for j in range(side):
                patch = masks[n, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH]
                kept[n, i, j] = patch.mean().ceil()
    return kept.flatten(1)


def embedded_by_hand(tower: nn.Module, images: Tensor, masks: Tensor, table: Tensor) -> Tensor:
    """Section 3.3 with open_clip's own blocks: x * m + p * (1 - m) before positions, and after the first blocks."""
    m = kept_by_hand(masks)[..., None]
    x = tower.conv1(images).flatten(2).transpose(1, 2)
    x = x * m + table[0] * (1 - m)
    x = torch.cat([tower.class_embedding.expand(len(x), 1, -1), x], dim=1) + tower.positional_embedding
    x = tower.ln_pre(x)
    for done, block in enumerate(tower.transformer.resblocks, start=1):
        x = block(x)
        if done < len(table):
            x = torch.cat([x[:, :1], x[:, 1:] * m + table[done] * (1 - m)], dim=1)
    return tower.ln_post(x[:, 0]) @ tower.proj


@pytest.mark.parametrize("depth", [1, 3, LAYERS])
@pytest.mark.parametrize("num_patches", [1, 16])
def test_embeddings_against_a_slow_reference(depth, num_patches):
    tower, images, masks = vit_tower(), random_images(32, 32, count=3), crop_masks()
    prompts = randomise(MaskPrompts(depth=depth, num_patches=num_patches, dim=WIDTH), 3)
    encoder = ClipViT(tower, last_block="none").eval()
    found = encoder(images, prompts=prompts(masks, PATCH)).image_embeds
    expected = embedded_by_hand(tower, images, masks, prompts.embeddings.expand(-1, 16, -1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    plain = encoder(images).image_embeds
    torch.testing.assert_close(found[1], plain[1], rtol=1e-4, atol=1e-5)  # nothing is masked
    assert (found[0] - plain[0]).abs().max() > 1e-3


def test_every_prompt_and_no_weight_of_the_tower_gets_a_gradient():
    encoder = ClipViT(vit_tower().requires_grad_(False), last_block="none")
    prompts = randomise(MaskPrompts(depth=3, num_patches=16, dim=WIDTH), 3)
    encoder(random_images(32, 32, count=3), prompts=prompts(crop_masks(), PATCH)).image_embeds.square().sum().backward()
    assert (prompts.embeddings.grad.abs().sum(dim=-1) > 0).all()
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_eva_takes_the_same_hooks():
    encoder = ClipEva(eva_tower(), last_block="none").eval()
    images, prompts = random_images(32, 32, count=3), randomise(MaskPrompts(depth=2, num_patches=1, dim=WIDTH), 3)
    found, plain = encoder(images, prompts=prompts(crop_masks(), PATCH)).image_embeds, encoder(images).image_embeds
    torch.testing.assert_close(found[1], plain[1], rtol=1e-4, atol=1e-5)
    assert (found[0] - plain[0]).abs().max() > 1e-3


def test_crops_of_another_size():
    prompts = MaskPrompts(depth=1, num_patches=16, dim=WIDTH)
    with pytest.raises(ValueError, match=r"mask prompts for 16 patches; a crop of 40 x 40 pixels has 25"):
        prompts(torch.ones(2, 40, 40), PATCH)


def mask_prompt_cfg(clip: str = "OVShapes-ViT", depth: int = 3, style: str = "mask_crop") -> CfgNode:
    cfg = tiny_cfg()
    cfg.MODEL.OVSEG.CLIP.NAME = clip
    cfg.MODEL.OVSEG.CROPS.SIZE = 44
    cfg.MODEL.OVSEG.CROPS.STYLE = style
    cfg.MODEL.OVSEG.CROPS.MASK_PROMPTS = depth
    return cfg


def test_sizes_from_the_config():
    cfg = mask_prompt_cfg()
    prompts = build_mask_prompts(cfg, build_clip_from_config(cfg))
    assert prompts.embeddings.shape == (3, 25, 128) and not prompts.embeddings.any()
    cfg = mask_prompt_cfg(depth=0)
    assert build_mask_prompts(cfg, build_clip_from_config(cfg)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": "OVShapes-RN"}, "MASK_PROMPTS is 3, but OVShapes-RN is no ViT"),
        ({"depth": 9}, "MASK_PROMPTS is 9; expected 0 to 8"),
        ({"depth": -1}, "MASK_PROMPTS is -1; expected 0 to 8"),
        ({"style": "cropmask"}, "CROPS.STYLE 'mask_crop'; got 'cropmask'"),
    ],
)
def test_what_takes_no_mask_prompts(options, message):
    cfg = mask_prompt_cfg(**options)
    with pytest.raises(ValueError, match=message) as error:
        build_mask_prompts(cfg, build_clip_from_config(cfg))
    assert "\n" not in str(error.value)
