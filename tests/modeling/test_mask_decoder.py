"""Texts among the queries of the masked-attention decoder (MTA-CLIP, equations 2 to 4)."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ovseg_d2.modeling.proposals.class_heads import LinearClassHead
from ovseg_d2.modeling.proposals.mask_decoder import MaskedAttentionDecoder, separate_groups
from tests.helpers import randomise

N, Q, T, C, HEADS = 2, 4, 3, 16, 2


def random_decoder(num_layers=3, separate=False):
    decoder = MaskedAttentionDecoder(
        in_dim=C,
        dim=C,
        mask_dim=C,
        class_head=LinearClassHead(dim=C, num_classes=5),
        num_queries=Q,
        num_heads=HEADS,
        ffn_dim=24,
        num_layers=num_layers,
        separate_texts=separate,
    )
    return randomise(decoder).eval()


def features(seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, 3), (3, 5), (6, 9))
    maps = [torch.randn(N, C, *size, generator=generator) for size in sizes]
    return maps, torch.randn(N, C, 12, 18, generator=generator), torch.randn(T, C, generator=generator)


def attend(block, query, key, value, blocked=None):
    """PyTorch's own attention with the weights of a residual block, which wants a mask for each head."""
    attention = nn.MultiheadAttention(C, HEADS, batch_first=True)
    attention.load_state_dict(block.attn.state_dict())
    if blocked is not None:
        blocked = blocked.repeat_interleave(HEADS, dim=0)
    return attention(query, key, value, attn_mask=blocked, need_weights=False)[0]


@torch.no_grad()
@pytest.mark.parametrize("separate", [False, True])
def test_one_layer_against_the_equations(separate):
    decoder = random_decoder(num_layers=1, separate=separate).train()
    maps, mask_features, texts = features()
    result = decoder(maps, mask_features, text_queries=texts)

    layer, level = decoder.layers[0], maps[0]
    memory = level.flatten(2).transpose(1, 2) + decoder.level_embed.weight[0]
    keys = memory + decoder.position_encoding(level).flatten(2).transpose(1, 2)
    masks = F.interpolate(result.aux[0].mask_logits, size=level.shape[-2:], mode="bilinear", align_corners=False)
    blocked = (masks < 0).flatten(2)
    blocked = blocked & ~blocked.all(dim=-1, keepdim=True)
    assert blocked.any()
    blocked = torch.cat([torch.zeros(N, T, blocked.shape[-1], dtype=torch.bool), blocked], dim=1)
    x = torch.cat([texts, decoder.query_feat.weight]).expand(N, -1, -1)
    place = torch.cat([torch.zeros(T, C), decoder.query_embed.weight]).expand(N, -1, -1)
    x = layer.cross_attn.norm(x + attend(layer.cross_attn, x + place, keys, memory, blocked))
    groups = [slice(0, T), slice(T, T + Q)] if separate else [slice(0, T + Q)]
    update = [attend(layer.self_attn, *[(x + place)[:, g]] * 2, x[:, g]) for g in groups]
    x = decoder.decoder_norm(layer.ffn(layer.self_attn.norm(x + torch.cat(update, dim=1))))

    torch.testing.assert_close(result.text_queries, x[:, :T], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.query_embeds, x[:, T:], rtol=1e-4, atol=1e-5)
    assert result.class_logits.shape == (N, Q, 6) and result.mask_logits.shape[1] == Q


@torch.no_grad()
def test_without_texts_nothing_changes():
    decoder = random_decoder().train()
    maps, mask_features, texts = features()
    plain, empty = decoder(maps, mask_features), decoder(maps, mask_features, text_queries=texts[:0])
    assert plain.text_queries is None and all(aux.text_queries is None for aux in plain.aux)
    torch.testing.assert_close(empty.class_logits, plain.class_logits)
    with_texts = decoder(maps, mask_features, text_queries=texts)
    assert (with_texts.class_logits - plain.class_logits).abs().max() > 1e-3
    assert torch.equal(with_texts.aux[0].class_logits, plain.aux[0].class_logits)
    assert with_texts.aux[0].text_queries is None and with_texts.aux[1].text_queries.shape == (N, T, C)


@torch.no_grad()
def test_permuted_texts_permute_their_rows_alone():
    decoder = random_decoder()
    maps, mask_features, texts = features()
    order = [2, 0, 1]
    before, after = (decoder(maps, mask_features, text_queries=rows) for rows in (texts, texts[order]))
    torch.testing.assert_close(after.text_queries, before.text_queries[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.mask_logits, before.mask_logits, rtol=1e-4, atol=1e-4)


def test_groups_are_strangers_to_each_other():
    blocked = separate_groups(1, 2, torch.device("cpu"))
    assert blocked.tolist() == [[[False, True, True], [True, False, False], [True, False, False]]]
