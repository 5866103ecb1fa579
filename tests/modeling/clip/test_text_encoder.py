"""The text tower against open_clip's own forward, cut or not, with and without prompts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ovseg_d2.modeling.clip.text_encoder import ClipTextEncoder
from tests.modeling.clip.tiny_text import random_tokens, tiny_text_model

TOKENS = random_tokens([5, 3, 9], vocab_size=50, width=12)
SIZES = {"vocab_size": 50, "context_length": 12}


def recorded_lengths(encoder: ClipTextEncoder) -> list[int]:
    """Grows by the length of the sequence that enters the first block, at each call."""
    lengths: list[int] = []
    batch_first = encoder.transformer.batch_first
    encoder.transformer.resblocks[0].register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1 if batch_first else 0])
    )
    return lengths


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("custom", "text_cfg", "length"),
    [
        (False, {}, 9),
        (True, {}, 9),
        (True, {"ls_init_value": 0.5, "mlp_ratio": 2.0}, 9),
        (True, {"pool_type": "eos", "eos_id": 49}, 9),
        (True, {"qk_norm": True, "scale_heads": True, "scale_fc": True}, 9),
        (False, {"pool_type": "last"}, 12),
        (True, {"pool_type": "first", "no_causal_mask": True}, 12),
        (True, {"no_causal_mask": True, "proj_bias": True}, 12),  # argmax, but padding is seen
        (True, {"proj_type": "none", "norm_kwargs": {"eps": 1e-3}}, 9),
    ],
)
def test_equals_open_clip(custom, text_cfg, length, train):
    model = tiny_text_model(custom=custom, **SIZES, **text_cfg).train(train)
    encoder = ClipTextEncoder.from_open_clip(model).train(train)
    lengths = recorded_lengths(encoder)
    torch.testing.assert_close(encoder(TOKENS), model.encode_text(TOKENS), rtol=1e-5, atol=1e-5)
    assert lengths[0] == length


def test_sequence_first_blocks():
    model = tiny_text_model(**SIZES)
    expected = model.encode_text(TOKENS)
    model.transformer.batch_first = False
    for block in model.transformer.resblocks:
        block.attn.batch_first = False
    torch.testing.assert_close(ClipTextEncoder.from_open_clip(model)(TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_keys_are_those_of_open_clip():
    model = tiny_text_model(**SIZES)
    encoder = ClipTextEncoder.from_open_clip(model)
    expected = {key for key in model.state_dict() if not key.startswith("visual.") and key != "logit_scale"}
    assert set(encoder.state_dict()) == expected
    assert (encoder.width, encoder.context_length, encoder.num_layers) == (16, 12, 2)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for use in (False, True):
        model = tiny_text_model(**SIZES)
        model.transformer.grad_checkpointing = use
        ClipTextEncoder.from_open_clip(model)(TOKENS).square().sum().backward()
        gradients.append(model.token_embedding.weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("per_class", [False, True])
def test_contexts_that_are_words_equal_the_sentence(per_class):
    encoder = ClipTextEncoder.from_open_clip(tiny_text_model(**SIZES))
    names = random_tokens([4, 3, 4], vocab_size=50, width=5)
    words = torch.tensor([[[7, 8, 9]], [[3, 4, 5]]]).expand(-1, 3, -1)  # P, B, n
    if per_class:
        words = words + torch.arange(3)[:, None]
    contexts = encoder.token_embedding(words)
    lengths = recorded_lengths(encoder)
    embeds = encoder(names, contexts=contexts if per_class else contexts[:, 0])
    assert embeds.shape == (2, 3, 10) and lengths == [7]
    for p in range(2):
        sentences = torch.cat([names[:, :1], words[p], names[:, 1:]], dim=1)
        torch.testing.assert_close(embeds[p], encoder(sentences), rtol=1e-5, atol=1e-5)


def test_towers_that_are_not_supported():
    with pytest.raises(ValueError, match="text tower of this CustomTextCLIP appends a class token"):
        ClipTextEncoder.from_open_clip(tiny_text_model(custom=True, embed_cls=True, **SIZES))
    with pytest.raises(ValueError, match="pools by 'none'; expected one of argmax"):
        ClipTextEncoder.from_open_clip(tiny_text_model(custom=True, pool_type="none", **SIZES))
    other = nn.Module()
    other.text = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="is a Linear; expected open_clip's TextTransformer"):
        ClipTextEncoder.from_open_clip(other)


def test_prompts_need_a_tower_that_reads_the_end():
    encoder = ClipTextEncoder.from_open_clip(tiny_text_model(custom=True, pool_type="last", **SIZES))
    with pytest.raises(ValueError, match="need a causal tower that reads EOT; this one pools by 'last'"):
        encoder(TOKENS, contexts=torch.zeros(1, 2, 16))


def test_too_long_with_prompts():
    encoder = ClipTextEncoder.from_open_clip(tiny_text_model(**SIZES))
    with pytest.raises(ValueError, match="13 tokens, prompts included; the tower has 12 places"):
        encoder(TOKENS, contexts=torch.zeros(1, 4, 16))


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.positional_embedding.data.mul_(2),
        lambda e: e.transformer.resblocks[1].load_state_dict({k: 2 * v for k, v in block_weights(e).items()}),
        lambda e: e.load_state_dict({k: 2 * v for k, v in e.state_dict().items()}, assign=True),
    ],
    ids=["data", "part", "assign"],
)
def test_hash_follows_the_weights(change):
    encoder = ClipTextEncoder.from_open_clip(tiny_text_model(**SIZES))
    before = encoder.weights_hash()
    assert ClipTextEncoder.from_open_clip(tiny_text_model(**SIZES)).weights_hash() == before
    assert encoder.train().eval().weights_hash() == before
    change(encoder)
    assert encoder.weights_hash() != before


def block_weights(encoder: ClipTextEncoder) -> dict[str, torch.Tensor]:
    return encoder.transformer.resblocks[1].state_dict()


def test_hash_tells_towers_of_the_same_weights_apart():
    settings = ({}, {"heads": 4}, {"quick_gelu": False}, {"norm_kwargs": {"eps": 1e-3}}, {"pool_type": "eos"})
    towers = [ClipTextEncoder.from_open_clip(tiny_text_model(**SIZES, **kwargs)) for kwargs in settings]
    assert len({tower.weights_hash() for tower in towers}) == len(settings)
    assert all(torch.equal(tower.positional_embedding, towers[0].positional_embedding) for tower in towers)
