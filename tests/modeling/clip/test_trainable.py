"""Policies: exactly which parameters train."""

import copy
from collections.abc import Callable

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer
from timm.models.convnext import ConvNeXt
from torch import nn

from ovseg_d2.modeling.clip.build import build_clip
from ovseg_d2.modeling.clip.convnext import ClipConvNeXt
from ovseg_d2.modeling.clip.eva import ClipEva
from ovseg_d2.modeling.clip.resnet import ClipResNet
from ovseg_d2.modeling.clip.text_encoder import ClipTextEncoder
from ovseg_d2.modeling.clip.trainable import (
    apply_policy,
    pack_split_weights,
    policies_of,
    split_packed_weights,
    split_qkv,
)
from ovseg_d2.modeling.clip.vit import ClipViT
from tests.helpers import randomise
from tests.modeling.clip.test_vit import close
from tests.modeling.clip.tiny_vit import LAYERS, eva_tower, random_images, vit_tower


def text_encoder() -> ClipTextEncoder:
    model = nn.Module()
    model.text = TextTransformer(context_length=9, vocab_size=30, width=16, heads=2, layers=LAYERS, output_dim=8)
    return ClipTextEncoder.from_open_clip(randomise(model)).eval()


def convnext_encoder() -> ClipConvNeXt:
    tower = TimmModel.__new__(TimmModel)
    nn.Module.__init__(tower)
    tower.trunk = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=0, drop_path_rate=0.1)
    tower.head = nn.Sequential()
    tower.head.add_module("proj", nn.Linear(16, 12))
    return ClipConvNeXt(tower)


def resnet_encoder() -> ClipResNet:
    return ClipResNet(ModifiedResNet(layers=(1, 1, 1, 1), output_dim=16, heads=2, image_size=64, width=8))


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: ClipViT(vit_tower(), mask_mode="maskclippp"),
    "eva02": lambda: ClipEva(eva_tower()),
    "eva01": lambda: ClipEva(eva_tower(rope=False)),
    "text": text_encoder,
    "resnet": resnet_encoder,
    "convnext": convnext_encoder,
}


def in_blocks(*names: str, root: str = "tower.transformer.resblocks") -> set[str]:
    return {f"{root}.{i}.{name}" for i in range(LAYERS) for name in names}


def both(*names: str) -> list[str]:
    return [f"{name}.{part}" for name in names for part in ("weight", "bias")]


PACKED = ["attn.in_proj_weight", "attn.in_proj_bias"]
SCALE = {"mask_logit_scale"}  # of the encoder, not of the tower
CASES = {
    ("vit", "frozen"): SCALE,
    ("vit", "attention"): in_blocks(*PACKED, *both("attn.out_proj", "ln_1", "ln_2"))
    | {"tower.ln_post.weight", "tower.ln_post.bias"}
    | SCALE,
    ("vit", "attention_in"): in_blocks("attn.in_proj_weight") | {"tower.positional_embedding"} | SCALE,
    ("vit", "attention_qv"): in_blocks("attn.q_proj_weight", "attn.v_proj_weight") | SCALE,
    ("vit", "projection"): {"tower.proj"} | SCALE,
    ("eva02", "attention_in"): in_blocks("attn.q_proj.weight", "attn.v_proj.weight", root="tower.trunk.blocks")
    | {"tower.trunk.pos_embed"},
    ("eva02", "attention_qv"): in_blocks("attn.q_proj.weight", "attn.v_proj.weight", root="tower.trunk.blocks"),
    ("eva01", "attention_in"): in_blocks("attn.qkv.weight", root="tower.trunk.blocks") | {"tower.trunk.pos_embed"},
    ("eva01", "attention"): in_blocks(
        "attn.qkv.weight", "attn.q_bias", "attn.v_bias", *both("attn.proj", "norm1", "norm2"), root="tower.trunk.blocks"
    )
    | {"tower.trunk.norm.weight", "tower.trunk.norm.bias"},
    ("eva01", "projection"): {"tower.trunk.head.weight", "tower.trunk.head.bias"},
    ("vit", "all_but_cls_pos_mlp_conv"): in_blocks(*PACKED, *both("attn.out_proj", "ln_1", "ln_2"))
    | {"tower.proj", "tower.ln_pre.weight", "tower.ln_pre.bias", "tower.ln_post.weight", "tower.ln_post.bias"}
    | SCALE,
    ("eva01", "all_but_proj_conv_mlp_pos_cls"): in_blocks(
        "attn.qkv.weight", "attn.q_bias", "attn.v_bias", *both("attn.proj", "norm1", "norm2"), root="tower.trunk.blocks"
    )
    | {"tower.trunk.norm.weight", "tower.trunk.norm.bias"},
    ("resnet", "attention"): set(both(*(f"tower.attnpool.{name}_proj" for name in "qkvc"))),
    ("resnet", "all_but_cls_pos_mlp_conv"): set(both(*(f"tower.attnpool.{name}_proj" for name in "qkvc"))),
    ("resnet", "all_but_pos_conv_proj"): set(both(*(f"tower.attnpool.{name}_proj" for name in "qkv"))),
    ("resnet", "all_but_bn"): {
        name
        for name, _ in resnet_encoder().named_parameters()
        if not (".bn" in name or "downsample.1." in name)  # open_clip counts the parts of its shortcuts
    },
    ("convnext", "before_s4"): {
        name
        for name, _ in convnext_encoder().named_parameters()
        if name.startswith(("tower.trunk.stem.", *(f"tower.trunk.stages.{i}." for i in range(3))))
    },
    ("convnext", "after_s4"): {
        name
        for name, _ in convnext_encoder().named_parameters()
        if name.startswith(("tower.trunk.stages.3.", "tower.trunk.head.", "tower.head."))
    },
    ("text", "frozen"): set(),
    ("text", "attention_mlp"): in_blocks(
        "attn.in_proj_weight", *both("mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2"), root="transformer.resblocks"
    )
    | {"positional_embedding"},
    ("text", "attention_in"): in_blocks("attn.in_proj_weight", root="transformer.resblocks") | {"positional_embedding"},
    ("text", "attention_qv"): in_blocks("attn.q_proj_weight", "attn.v_proj_weight", root="transformer.resblocks"),
    ("text", "projection"): {"text_projection"},
}


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_exactly_these_train(name, policy):
    encoder = ENCODERS[name]()
    apply_policy(encoder, policy)
    assert {key for key, p in encoder.named_parameters() if p.requires_grad} == CASES[name, policy]


ONE_UNIT = {
    "cls": {"tower.class_embedding"},
    "pos": {"tower.positional_embedding"},
    "mlp": in_blocks(*both("mlp.c_fc", "mlp.c_proj")),
    "conv": {"tower.conv1.weight"},
    "proj": {"tower.proj"},
}


@pytest.mark.parametrize("unit", ONE_UNIT)
def test_a_unit_of_a_vit_is_frozen(unit):
    encoder = ClipViT(vit_tower())
    apply_policy(encoder, f"all_but_{unit}")
    assert {key for key, p in encoder.named_parameters() if not p.requires_grad} == ONE_UNIT[unit]


@pytest.mark.parametrize("name", ["vit", "eva02", "resnet"])
@pytest.mark.parametrize("units", ["", "cls_mpl", "cls_"])
def test_unknown_unit(name, units):
    unknown = "mpl" if "mpl" in units else ""
    with pytest.raises(
        ValueError, match=f"^MODEL.OVSEG.CLIP.TRAINABLE: .*'{unknown}'; .* cls, pos, mlp, conv, proj, .*"
    ):
        apply_policy(ENCODERS[name](), f"all_but_{units}")


@pytest.mark.parametrize("name", ["text", "convnext"])
def test_towers_without_units(name):
    with pytest.raises(ValueError, match="'all_but_proj' for a Clip.*; expected one of frozen, full, [a-z_0-9, ]+$"):
        apply_policy(ENCODERS[name](), "all_but_proj")


def test_what_mafts_code_trains():
    """Of ViT-B/16 98 tensors: 8 in each of 12 blocks, and the last norm."""
    with torch.device("meta"):
        encoder = build_clip("ViT-B-16", with_text=False).visual
    apply_policy(encoder, "attention")
    trained = [key.removeprefix("tower.") for key, p in encoder.named_parameters() if p.requires_grad]
    names = [*PACKED, *both("attn.out_proj", "ln_1", "ln_2")]
    expected = {f"transformer.resblocks.{i}.{name}" for i in range(12) for name in names}
    assert len(trained) == 98 and set(trained) == expected | {"ln_post.weight", "ln_post.bias"}


FROZEN_BY_TRUNK = {
    "vit": ("tower.ln_post.", "tower.proj"),
    "eva02": ("tower.trunk.norm.", "tower.trunk.head."),
    "resnet": ("tower.attnpool.",),
    "convnext": ("tower.trunk.head.", "tower.head."),
}


@pytest.mark.parametrize("name", FROZEN_BY_TRUNK)
def test_trunk_is_all_but_the_head(name):
    encoder = ENCODERS[name]()
    apply_policy(encoder, "trunk")
    frozen = {key for key, p in encoder.named_parameters() if not p.requires_grad}
    assert frozen == {key for key, _ in encoder.named_parameters() if key.startswith(FROZEN_BY_TRUNK[name])}
    assert frozen


@pytest.mark.parametrize("name", ENCODERS)
def test_full_undoes_frozen(name):
    encoder = ENCODERS[name]().train()
    apply_policy(encoder, "frozen")
    if name != "text":  # its tower has nothing that training changes
        assert not any(module.training for module in encoder.tower.modules())
        encoder.train()  # what a trainer calls must not wake a frozen tower
        assert encoder.training and not any(module.training for module in encoder.tower.modules())
    apply_policy(encoder, "full")
    assert all(p.requires_grad for p in encoder.parameters())
    assert all(module.training for module in encoder.modules())


@pytest.mark.parametrize("name", ENCODERS)
def test_unknown_policy_names_the_key_and_what_is_allowed(name):
    encoder = ENCODERS[name]()
    allowed = policies_of(getattr(encoder, "tower", encoder))
    maft = name in ("vit", "eva02", "eva01", "resnet")
    units = ", all_but_UNIT_UNIT... of the units cls pos mlp conv proj" if maft else ""
    key = "TEXT" if name == "text" else "CLIP"
    with pytest.raises(ValueError, match=f"MODEL.OVSEG.{key}.TRAINABLE: 'attn' .*{', '.join(allowed)}{units}$"):
        apply_policy(encoder, "attn")
    assert ("attention" in allowed) == maft


def test_frozen_batch_norms_keep_their_statistics():
    encoder = resnet_encoder()
    apply_policy(encoder, "all_but_bn")
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    encoder.train()(random_images(64, 64)).image_embeds.sum().backward()
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(module.training for module in norms)
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())
    assert encoder.tower.conv1.weight.grad is not None and encoder.tower.attnpool.c_proj.weight.grad is not None
    apply_policy(encoder, "full")
    encoder(random_images(64, 64))
    assert not torch.equal(encoder.tower.bn1.running_mean, before["tower.bn1.running_mean"])


def test_unknown_tower():
    with pytest.raises(ValueError, match="tower Linear"):
        apply_policy(nn.Linear(2, 2), "full")


@torch.no_grad()
def test_split_projections_give_the_same_output_in_pytorchs_own_forward():
    attn = randomise(nn.MultiheadAttention(8, 2, batch_first=True))
    split, x = copy.deepcopy(attn), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    split_qkv(split)
    split_qkv(split)  # a second time changes nothing
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    assert sorted(dict(split.named_parameters())) == sorted(names)
    close(split(x, x, x)[0], attn(x, x, x)[0], tolerance=1e-6)
    split.train(), attn.train()
    close(split(x, x, x)[0], attn(x, x, x)[0], tolerance=1e-6)


def test_packed_weights_load_into_split_projections():
    images, official = random_images(32, 32), vit_tower(seed=7)
    encoder = ClipViT(vit_tower())
    apply_policy(encoder, "attention_qv")
    encoder.tower.load_state_dict(official.state_dict())
    with torch.no_grad():
        close(encoder(images).image_embeds, official(images))
    packed = official.state_dict()
    split = split_packed_weights(packed, encoder.tower.state_dict())
    assert split.keys() == encoder.tower.state_dict().keys()
    assert split_packed_weights(packed, packed).keys() == packed.keys()


def test_split_weights_load_into_packed_projections():
    packed = vit_tower(seed=7).state_dict()
    split = split_packed_weights(packed, {name.replace("in_proj", "q_proj") for name in packed})
    assert any("q_proj_weight" in name for name in split) and not any("in_proj_weight" in name for name in split)
    again = pack_split_weights(split, packed)
    assert again.keys() == packed.keys() and all(torch.equal(again[name], packed[name]) for name in packed)
    assert pack_split_weights(split, split).keys() == split.keys()


def test_only_queries_and_values_get_gradients():
    encoder = ClipViT(vit_tower(), last_block="none")
    apply_policy(encoder, "attention_qv")
    encoder(random_images(32, 32)).image_embeds.square().sum().backward()
    with_gradient = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == in_blocks("attn.q_proj_weight", "attn.v_proj_weight")
