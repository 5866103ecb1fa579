"""The Swin backbone against a plain restatement of the paper, and its behaviour as a detectron2 backbone."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch.nn import functional as F

from ovseg_d2.config import add_ovseg_config
from ovseg_d2.modeling.backbones.swin import SwinTransformer

TINY = {"embed_dim": 8, "depths": (2, 2, 1, 2), "num_heads": (2, 2, 4, 4), "window_size": 3}


def tiny_swin(**overrides):
    torch.manual_seed(0)
    model = SwinTransformer(**{**TINY, **overrides}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # every parameter must matter: no zeros, no ones
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


# ---- plain restatement: one query token at a time, straight from a state dict with the public names


def plain_norm(x, weights, prefix):
    return F.layer_norm(x, x.shape[-1:], weights[f"{prefix}.weight"], weights[f"{prefix}.bias"])


def plain_linear(x, weights, prefix):
    return F.linear(x, weights[f"{prefix}.weight"], weights.get(f"{prefix}.bias"))


def plain_window_attention(x, weights, prefix, heads, window, shift):
    """x (h, w, C), already normalised."""
    h, w, dim = x.shape
    padded_h, padded_w = (math.ceil(length / window) * window for length in (h, w))
    padded = x.new_zeros(padded_h, padded_w, dim)
    padded[:h, :w] = x
    q, k, v = plain_linear(padded, weights, f"{prefix}.qkv").split(dim, dim=-1)
    table = weights[f"{prefix}.relative_position_bias_table"]
    head_dim = dim // heads
    out = torch.zeros_like(padded)
    for i in range(padded_h):
        for j in range(padded_w):
            # Places in the shifted grid that share the query's window, and are there without wrapping relative to it.
            keys = [
                (a, b)
                for a in range(i // window * window, i // window * window + window)
                for b in range(j // window * window, j // window * window + window)
                if (a + shift >= padded_h) == (i + shift >= padded_h)
                and (b + shift >= padded_w) == (j + shift >= padded_w)
            ]
            source = [((a + shift) % padded_h, (b + shift) % padded_w) for a, b in keys]
            here = ((i + shift) % padded_h, (j + shift) % padded_w)
            for head in range(heads):
                part = slice(head * head_dim, (head + 1) * head_dim)
                logits = torch.stack(
                    [
                        q[here][part] @ k[there][part] / math.sqrt(head_dim)
                        + table[(i - a + window - 1) * (2 * window - 1) + (j - b + window - 1), head]
                        for (a, b), there in zip(keys, source, strict=True)
                    ]
                )
                values = torch.stack([v[there][part] for there in source])
                out[here][part] = logits.softmax(0) @ values
    return plain_linear(out[:h, :w], weights, f"{prefix}.proj")


def plain_swin(image, weights, *, depths, num_heads, window_size, **_):
    """image (3, H, W) -> [(C, h, w)] of each stage."""
    height, width = image.shape[-2:]
    image = F.pad(image, (0, -width % 4, 0, -height % 4))
    x = F.conv2d(image[None], weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=4)
    x = plain_norm(x[0].permute(1, 2, 0), weights, "patch_embed.norm")
    outputs = []
    for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}"
            shift = window_size // 2 if block % 2 else 0
            y = plain_norm(x, weights, f"{prefix}.norm1")
            x = x + plain_window_attention(y, weights, f"{prefix}.attn", heads, window_size, shift)
            y = plain_norm(x, weights, f"{prefix}.norm2")
            x = x + plain_linear(F.gelu(plain_linear(y, weights, f"{prefix}.mlp.fc1")), weights, f"{prefix}.mlp.fc2")
        outputs.append(plain_norm(x, weights, f"norm{stage}").permute(2, 0, 1))
        if stage < len(depths) - 1:
            h, w, dim = x.shape
            even = x.new_zeros(h + h % 2, w + w % 2, dim)
            even[:h, :w] = x
            merged = torch.cat([even[0::2, 0::2], even[1::2, 0::2], even[0::2, 1::2], even[1::2, 1::2]], dim=-1)
            merged = plain_norm(merged, weights, f"layers.{stage}.downsample.norm")
            x = plain_linear(merged, weights, f"layers.{stage}.downsample.reduction")
    return outputs


@pytest.mark.parametrize(
    ("size", "window_size"),
    [((48, 48), 3), ((37, 50), 3), ((41, 23), 4), ((5, 9), 4)],
    ids=["divisible", "odd", "even_window", "smaller_than_a_window"],
)
def test_outputs_equal_the_plain_restatement(size, window_size):
    options = {**TINY, "window_size": window_size}
    model = tiny_swin(**options)
    image = torch.randn(3, *size, dtype=torch.float64)
    with torch.no_grad():
        outputs = model(image[None])
        expected = plain_swin(image, model.state_dict(), **options)
    assert list(outputs) == ["res2", "res3", "res4", "res5"]
    for (name, output), plain in zip(outputs.items(), expected, strict=True):
        torch.testing.assert_close(
            output[0], plain, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_batch_equals_single_images():
    model = tiny_swin()
    images = torch.randn(3, 3, 37, 50, dtype=torch.float64)
    with torch.no_grad():
        batch = model(images)
        singles = [model(image[None]) for image in images]
    for name, output in batch.items():
        torch.testing.assert_close(output, torch.cat([single[name] for single in singles]))


def test_output_shape_agrees_with_forward():
    model = tiny_swin(out_features=["res5", "res3"])
    outputs = model(torch.randn(1, 3, 64, 32, dtype=torch.float64))
    shapes = model.output_shape()
    assert list(outputs) == list(shapes) == ["res3", "res5"]
    for name, output in outputs.items():
        stride = shapes[name].stride
        assert output.shape == (1, shapes[name].channels, 64 // stride, 32 // stride)


def test_every_parameter_gets_a_gradient_also_with_fewer_outputs():
    model = tiny_swin(out_features=["res3"]).train()
    sum(output.square().sum() for output in model(torch.randn(1, 3, 37, 50, dtype=torch.float64)).values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_gradient_checkpointing_changes_nothing_but_memory():
    image = torch.randn(2, 3, 37, 50, dtype=torch.float64)
    gradients = []
    for use_checkpoint in (False, True):
        model = tiny_swin(use_checkpoint=use_checkpoint).train()
        sum(output.square().sum() for output in model(image).values()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_drop_path_drops_whole_images_in_training_only():
    model = tiny_swin(depths=(1, 1, 1, 2), drop_path_rate=0.5)
    rates = [block.drop_path.p for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5])
    drop_path = model.layers[3].blocks[1].drop_path
    x = torch.ones(64, 2, 3)
    assert torch.equal(drop_path(x), x)
    drop_path.train()
    kept = drop_path(x).flatten(1)
    assert sorted(set(kept.flatten().tolist())) == [0.0, 2.0]
    assert torch.equal(kept, kept[:, :1].expand_as(kept))


def test_frozen_stages_do_not_train():
    model = tiny_swin(freeze_at=2, drop_path_rate=0.5).train()
    frozen = {name.rpartition(".blocks")[0] or name for name, p in model.named_parameters() if not p.requires_grad}
    assert all(name.startswith(("patch_embed", "layers.0")) for name in frozen)
    assert all(not p.requires_grad for p in [*model.patch_embed.parameters(), *model.layers[0].parameters()])
    assert not model.layers[0].training and model.layers[1].training
    assert all(p.requires_grad for p in tiny_swin(freeze_at=0).parameters())


@pytest.mark.parametrize(
    ("dim", "depths", "heads", "window", "million"),
    [
        (96, [2, 2, 6, 2], [3, 6, 12, 24], 7, 27.52),
        (96, [2, 2, 18, 2], [3, 6, 12, 24], 7, 48.84),
        (128, [2, 2, 18, 2], [4, 8, 16, 32], 12, 86.88),
        (192, [2, 2, 18, 2], [6, 12, 24, 48], 12, 195.20),
    ],
    ids=["T", "S", "B", "L"],
)
def test_published_sizes_build_from_config_on_the_meta_device(dim, depths, heads, window, million):
    cfg = get_cfg()
    add_ovseg_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "SwinTransformer"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    swin = cfg.MODEL.SWIN
    swin.EMBED_DIM, swin.DEPTHS, swin.NUM_HEADS, swin.WINDOW_SIZE = dim, depths, heads, window
    with torch.device("meta"):
        model = build_backbone(cfg, ShapeSpec(channels=3))
    assert model.size_divisibility == 32
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(million, abs=0.01)


def test_names_are_those_of_the_public_files():
    block = ["norm1.weight", "norm1.bias", "attn.relative_position_bias_table", "attn.qkv.weight", "attn.qkv.bias"]
    block += ["attn.proj.weight", "attn.proj.bias", "norm2.weight", "norm2.bias"]
    block += ["mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
    merge = ["reduction.weight", "norm.weight", "norm.bias"]
    expected = [f"patch_embed.{name}" for name in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")]
    for stage, depth in enumerate(TINY["depths"]):
        expected += [f"layers.{stage}.blocks.{index}.{name}" for index in range(depth) for name in block]
        expected += [f"layers.{stage}.downsample.{name}" for name in merge if stage < 3]
        expected += [f"norm{stage}.weight", f"norm{stage}.bias"]
    assert sorted(tiny_swin().state_dict()) == sorted(expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"out_features": ["res6"]}, "MODEL.SWIN.OUT_FEATURES: got \\['res6'\\], allowed is any of"),
        ({"out_features": []}, "MODEL.SWIN.OUT_FEATURES"),
        ({"num_heads": (2, 2)}, "NUM_HEADS has 2 values and DEPTHS 4"),
    ],
)
def test_bad_options_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        SwinTransformer(**{**TINY, **overrides})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast_runs_close_to_float32(device):
    model = tiny_swin().float().to(device)
    image = torch.randn(2, 3, 37, 50, device=device)
    with torch.no_grad():
        full = model(image)
        with torch.autocast(device, dtype=torch.bfloat16):
            half = model(image)
    for name, output in full.items():
        assert (half[name].float() - output).norm() / output.norm() < 0.1, name
