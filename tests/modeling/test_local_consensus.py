"""LDVC's local-consensus attention, its decoder and the text adapter."""

import pytest
import torch
from torch import nn

from ovseg_d2.modeling.pixel_classification import routing_attention
from ovseg_d2.modeling.pixel_classification.local_consensus import LocalConsensusDecoder, TextAdapter
from ovseg_d2.modeling.pixel_classification.routing_attention import LocalConsensusAttention
from tests.helpers import randomise


def attention(**options):
    return randomise(LocalConsensusAttention(**({"dim": 12, "num_heads": 3, "window_size": 4, "top_k": 2} | options)))


def both_forms(**options):
    return [attention(**options, form=form) for form in ("gather", "dense")]


def window_by_window(module, x):
    """The equations, one window of one image after the other."""
    n, (height, width) = module.window_size, x.shape[1:3]
    qkv = module.qkv(x)
    out = torch.zeros_like(x)
    windows = [
        [(r, c) for r in range(top, min(top + n, height)) for c in range(left, min(left + n, width))]
        for top in range(0, height, n)
        for left in range(0, width, n)
    ]
    for image in range(len(x)):
        means = torch.stack([torch.stack([x[image, r, c] for r, c in pixels]).mean(0) for pixels in windows])
        for i, pixels in enumerate(windows):
            best = (means @ means[i]).argsort(descending=True)[: module.top_k]
            keys = [pixel for j in best.tolist() for pixel in windows[j]]
            q = torch.stack([qkv[image, r, c] for r, c in pixels]).chunk(3, -1)[0]
            k, v = torch.stack([qkv[image, r, c] for r, c in keys]).chunk(3, -1)[1:]
            q, k, v = (y.unflatten(-1, (module.num_heads, -1)).transpose(0, 1) for y in (q, k, v))
            values = ((q @ k.mT) * module.scale).softmax(-1) @ v
            for (r, c), value in zip(pixels, values.transpose(0, 1).flatten(1), strict=True):
                out[image, r, c] = value
    return module.out(out)


@pytest.mark.parametrize("form", ["gather", "dense"])
@pytest.mark.parametrize(("size", "top_k"), [((8, 12), 3), ((10, 7), 2), ((9, 3), 1)])
def test_attention_equals_its_equations(form, size, top_k):
    torch.manual_seed(0)
    module, x = attention(form=form, top_k=top_k), torch.randn(2, *size, 12)
    torch.testing.assert_close(module(x), window_by_window(module, x))


def test_forms_agree_with_their_gradients():
    torch.manual_seed(0)
    x, weights = torch.randn(2, 10, 7, 12), torch.randn(2, 10, 7, 12)
    results = []
    for module in both_forms(scale="dim"):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        (out * weights).sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in module.parameters())])
    assert module.scale == pytest.approx(12**-0.5)
    assert (results[0][0] - results[1][0]).abs().max() < 1e-6
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("top_k", [6, 40, 0])
def test_all_windows_are_plain_attention(top_k):
    torch.manual_seed(0)
    x = torch.randn(2, 10, 7, 12)
    plain = nn.MultiheadAttention(12, 3, batch_first=True)
    for module in both_forms(top_k=top_k):
        plain.in_proj_weight, plain.in_proj_bias, plain.out_proj = module.qkv.weight, module.qkv.bias, module.out
        expected = plain(*[x.flatten(1, 2)] * 3)[0].view_as(x)
        torch.testing.assert_close(module(x), expected)
        assert module.route(x).shape == (2, 6, 6)


def test_a_map_smaller_than_a_window():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 3, 12)
    for module in both_forms(top_k=1):
        torch.testing.assert_close(module(x), window_by_window(module, x))
        assert module.route(x).tolist() == [[[0]]] * 2


def test_routes_are_sorted_and_leave_out_unlike_windows():
    """Windows of two kinds that point in opposite directions: each sees its own kind, the longest mean first."""
    signs = torch.tensor([1.0, -2.0, 3.0, -4.0]).repeat_interleave(4)
    x = signs[None, None, :, None] * torch.ones(1, 4, 1, 12)
    module = attention()
    assert module.route(x).tolist() == [[[2, 0], [3, 1], [2, 0], [3, 1]]]
    for form in ("gather", "dense"):
        module.form = form
        far = x.clone()
        far[:, :, :4] *= 0.5  # the other kind does not change what the even windows' do, nor the reverse
        before, after = module(x), module(far)
        torch.testing.assert_close(after[:, :, 4:8], before[:, :, 4:8])
        assert not torch.allclose(after[:, :, 8:12], before[:, :, 8:12])


def test_the_choice_is_made_in_float32_and_without_gradient():
    torch.manual_seed(0)
    module, x = attention(), torch.randn(1, 12, 12, 12, requires_grad=True)
    chosen = module.route(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.route(x), chosen)
        assert module(x).dtype == torch.bfloat16


def test_chunks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    module, x = attention(form="gather"), torch.randn(2, 10, 7, 12)
    expected = module(x)
    monkeypatch.setattr(routing_attention, "CHUNK_ELEMENTS", 2 * 12 * 16 * 2 * 4)  # four windows of six
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(("side", "gathered"), [(12, False), (16, True)])
def test_large_maps_are_gathered(monkeypatch, side, gathered):
    module, calls = attention(form="auto", top_k=2), []
    gather = module._gathered_attention
    monkeypatch.setattr(module, "_gathered_attention", lambda *args: calls.append(1) or gather(*args))
    module(torch.randn(1, side, side, 12))
    assert bool(calls) == gathered


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 5}, "HEADS is 5; expected a divisor of 12"),
        ({"scale": "sqrt"}, "SCALE is 'sqrt'; expected one of"),
        ({"window_size": 0}, "WINDOW_SIZE is 0; expected 1 or more"),
        ({"top_k": -1}, "TOP_K is -1; expected a number of windows"),
        ({"form": "sparse"}, "FORM is 'sparse'; expected one of"),
    ],
)
def test_bad_attention_options(options, words):
    with pytest.raises(ValueError, match=f"MODEL.OVSEG.LDVC.{words}"):
        attention(**options)


def test_text_adapter():
    torch.manual_seed(0)
    adapter, image, text = randomise(TextAdapter(dim=6)), torch.randn(2, 6), torch.randn(3, 6)
    out = adapter(image, text)
    for n in range(2):
        for k in range(3):
            expected = adapter.weight @ torch.cat([image[n] * text[k], text[k]]) + adapter.bias
            torch.testing.assert_close(out[n, k], expected)


def decoder(**options):
    sizes = {"dim": 12, "layer_dim": 10, "num_heads": 3, "ffn_dim": 20, "window_size": 4, "top_k": 2}
    return LocalConsensusDecoder(**(sizes | options))


def decoder_inputs(num_blocks=2, size=(9, 7)):
    torch.manual_seed(0)
    dense = nn.functional.normalize(torch.randn(2, 12, *size), dim=1)
    return dense, torch.randn(2, 5, 12), [torch.randn(2, 10, *size) for _ in range(num_blocks)]


def test_parameters_at_the_papers_sizes():
    with torch.device("meta"):
        whole, adapter = LocalConsensusDecoder(dim=512, layer_dim=768), TextAdapter(dim=512)
    assert sum(p.numel() for p in whole.parameters()) == 2 * 4_598_784
    assert sum(p.numel() for p in adapter.parameters()) == 524_800


def test_logits_of_every_block():
    dense, text, layers = decoder_inputs(3)
    module = randomise(decoder(num_blocks=3)).eval()
    logits = module.block_logits(dense, text, layers)
    assert [tuple(x.shape) for x in logits] == [(2, 5, 9, 7)] * 3
    torch.testing.assert_close(logits[-1], module(dense, text, layers))
    x = module.blocks[0](dense.permute(0, 2, 3, 1), text, layers[0])
    torch.testing.assert_close(logits[0][1, 2], x[1] @ text[1, 2])


def test_classes_and_images_are_interchangeable():
    dense, text, layers = decoder_inputs()
    module = randomise(decoder()).eval()
    logits = module(dense, text, layers)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(module(dense, text[:, order], layers), logits[:, order])
    alone = module(dense[1:], text[1:], [layer[1:] for layer in layers])
    torch.testing.assert_close(alone, logits[1:])


def test_one_class():
    """The softmax over one text is 1, so cross-attention adds the same vector everywhere."""
    dense, text, layers = decoder_inputs()
    block = randomise(decoder()).eval().blocks[0]
    update = block.cross_attention(torch.randn(2, 6, 12), block.text_norm(text[:, :1]))
    torch.testing.assert_close(update, update[:, :1].expand_as(update))
    assert torch.isfinite(decoder().eval()(dense, text[:, :1], layers)).all()


def test_every_parameter_learns_and_dropout_is_for_training():
    dense, text, layers = decoder_inputs()
    module = randomise(decoder(norm_layers=True)).train()
    text.requires_grad_()
    logits = module(dense, text, layers)
    assert not torch.equal(logits, module(dense, text, layers))
    # shifting all logits of a row changes no softmax: key biases have a gradient of 0 up to rounding
    logits.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters()) and text.grad.abs().max() > 0
    silent = [name for name, p in module.named_parameters() if p.grad.abs().max() < 1e-6]
    assert all(name.endswith("k_proj.bias") for name in silent)
    module.eval()
    torch.testing.assert_close(module(dense, text, layers), module(dense, text, layers))


def test_layers_that_add_nothing_at_first():
    dense, text, layers = decoder_inputs()
    others = [layer + torch.randn_like(layer) for layer in layers]
    torch.manual_seed(1)
    module = decoder(conv_zero_init=True).eval()
    torch.testing.assert_close(module(dense, text, layers), module(dense, text, others))
    module = decoder().eval()
    assert not torch.allclose(module(dense, text, layers), module(dense, text, others))


def test_normalised_layers():
    dense, text, layers = decoder_inputs()
    scaled = [3 * layer + 1 for layer in layers]
    for norm_layers in (True, False):
        module = randomise(decoder(norm_layers=norm_layers)).eval()
        out, other = module(dense, text, layers), module(dense, text, scaled)
        assert torch.allclose(out, other, atol=1e-3) == norm_layers


def test_no_routing_is_another_decoder_with_the_same_weights():
    dense, text, layers = decoder_inputs()
    routed, plain, all_windows = decoder(), decoder(top_k=0), decoder(top_k=6)
    for module in (routed, plain, all_windows):
        randomise(module).eval()
    expected = plain(dense, text, layers)
    torch.testing.assert_close(all_windows(dense, text, layers), expected)
    assert not torch.allclose(routed(dense, text, layers), expected)


def test_a_decoder_has_blocks():
    with pytest.raises(ValueError, match="MODEL.OVSEG.LDVC.TAPS has 0 layers; expected 1 or more"):
        decoder(num_blocks=0)
