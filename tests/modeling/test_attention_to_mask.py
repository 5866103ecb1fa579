"""ZegCLIP's decoder, whose class maps are attention logits, and the attention that it shares."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ovseg_d2.modeling.layers.attention import CrossAttention
from ovseg_d2.modeling.pixel_classification.attention_to_mask import AttentionToMaskDecoder
from tests.helpers import randomise


def decoder(**options):
    return AttentionToMaskDecoder(**({"dim": 12, "num_layers": 3, "num_heads": 3, "ffn_dim": 20} | options))


def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 12, 5, 7), torch.randn(2, 4, 12)


def by_torch(module, query, memory):
    """The same by torch's attention."""
    theirs = nn.MultiheadAttention(query.shape[-1], module.num_heads, batch_first=True)
    projections = (module.q_proj, module.k_proj, module.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
    theirs.out_proj = module.proj
    return theirs(query, memory, memory)[0]


def test_cross_attention_equals_torch():
    torch.manual_seed(0)
    module = randomise(CrossAttention(dim=12, num_heads=3)).eval()
    query, memory = torch.randn(2, 4, 12), torch.randn(2, 9, 12)
    torch.testing.assert_close(module(query, memory), by_torch(module, query, memory))
    scaled = CrossAttention(dim=12, num_heads=3, scale="dim").eval()
    scaled.load_state_dict(module.state_dict())
    assert scaled.scale == pytest.approx(module.scale / 3**0.5)
    assert not torch.allclose(scaled(query, memory), module(query, memory))


@pytest.mark.parametrize("where", ["dropout", "weight_dropout"])
def test_dropout_of_cross_attention(where):
    torch.manual_seed(0)
    module = randomise(CrossAttention(dim=12, num_heads=3, **{where: 0.5}))
    query, memory = torch.randn(2, 4, 12), torch.randn(2, 9, 12)
    assert not torch.equal(module(query, memory), module(query, memory))
    module.eval()
    assert torch.equal(module(query, memory), module(query, memory))


def test_decoder_equals_its_equations():
    dense, queries = inputs()
    module = randomise(decoder()).eval()
    pixels, q = dense.flatten(2).mT, queries
    for layer in module.layers:
        q = layer.norm(q + by_torch(layer.attention, q, pixels))
        q = layer.ffn.norm(q + layer.ffn.linear2(layer.ffn.linear1(q).relu()))
    query, key = module.mask_attention.q_proj(q), module.mask_attention.k_proj(pixels)
    heads = [a @ b.mT / 4**0.5 for a, b in zip(query.split(4, -1), key.split(4, -1), strict=True)]
    expected = torch.stack(heads).mean(0).unflatten(-1, (5, 7))
    torch.testing.assert_close(module(dense, queries), expected)


def test_classes_and_images_are_interchangeable():
    dense, queries = inputs()
    module = randomise(decoder()).eval()
    logits, order = module(dense, queries), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(module(dense, queries[:, order]), logits[:, order])
    torch.testing.assert_close(module(dense[1:], queries[1:, :1]), logits[1:, :1])


def test_every_parameter_learns():
    dense, queries = inputs()
    module = randomise(decoder()).train()
    logits = module(dense, queries)
    assert not torch.equal(logits, module(dense, queries))
    F.softplus(logits).sum().backward()
    silent = [name for name, p in module.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7]
    assert all(name.endswith("attention.k_proj.bias") and name.startswith("layers.") for name in silent)


def test_layers_start_alike():
    module = decoder()
    first, second = (layer.state_dict() for layer in module.layers)
    torch.testing.assert_close(first, second)
    for name in ("q_proj", "k_proj"):
        last = getattr(module.mask_attention, name).weight
        assert torch.equal(first[f"attention.{name}.weight"], last)
        assert first[f"attention.{name}.weight"].data_ptr() != last.data_ptr()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 5}, "HEADS is 5; expected a divisor of 12"),
        ({"num_layers": 0}, "ATM_LAYERS is 0; expected 1 or more"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=f"MODEL.OVSEG.LDVC.{words}"):
        decoder(**options)
