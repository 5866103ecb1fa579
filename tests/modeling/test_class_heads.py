"""The "embed" class head: ZegFormer's, ZSSeg's and FreeSeg's ways of comparing queries with texts."""

import math

import pytest
import torch
from torch.nn import functional as F

from ovseg_d2.modeling.proposals.class_heads import EmbedClassHead
from ovseg_d2.structures import TextClasses
from tests.helpers import randomise

ZSSEG = {"num_layers": 2, "learn_temperature": False, "void_normalised": True}
ZEGFORMER = {"num_layers": 1, "learn_temperature": True, "void_normalised": False}


def make_head(**options):
    return EmbedClassHead(dim=8, embed_dim=6, hidden_dim=10, temperature=0.01, **options)


def make_text(class_ids):
    flags = torch.ones(max(class_ids) + 1, dtype=torch.bool)
    embeds = F.normalize(torch.randn(len(class_ids), 1, 6), dim=-1)
    return TextClasses(embeds=embeds, class_ids=torch.tensor(class_ids), is_thing=flags, seen=flags)


@torch.no_grad()
@pytest.mark.parametrize("options", [ZSSEG, ZEGFORMER], ids=["zsseg", "zegformer"])
def test_logits(options):
    torch.manual_seed(0)
    head, text, queries = make_head(**options), make_text([0, 1, 1, 2]), torch.randn(2, 5, 8)
    scale = math.exp(float(head.logit_scale))
    assert scale == pytest.approx(100.0, rel=1e-5)
    weights = {name: value for name, value in randomise(head).state_dict().items() if "logit_scale" not in name}
    head.void_embedding.weight.mul_(3.0)
    if options["learn_temperature"]:
        head.logit_scale.fill_(4.9)  # beyond CLIP's limit of 100, which is none here
        scale = math.exp(4.9)
    x = queries @ weights["mlp.layers.0.weight"].T + weights["mlp.layers.0.bias"]
    if options["num_layers"] == 2:
        x = x.relu() @ weights["mlp.layers.1.weight"].T + weights["mlp.layers.1.bias"]
    x = x / x.norm(dim=-1, keepdim=True)
    void = head.void_embedding.weight
    if options["void_normalised"]:
        void = void / void.norm()
    entries = scale * x @ torch.cat([text.embeds[:, 0], void]).T
    classes = torch.stack([entries[..., 0], entries[..., 1:3].amax(-1), entries[..., 3], entries[..., 4]], dim=-1)
    logits = head(queries, torch.empty(2, 5, 3, 3), torch.empty(2, 4, 3, 3), text)
    torch.testing.assert_close(logits, classes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.void_row(), void)


def test_what_trains_and_what_is_kept():
    fixed, learned = make_head(**ZSSEG), make_head(**ZEGFORMER)
    assert "logit_scale" not in fixed.state_dict() and "logit_scale" in dict(learned.named_parameters())
    for head in (fixed, learned):
        # A void row far longer or shorter than a text would decide alone at first, where its length counts.
        assert 0.2 < float(head.void_embedding.weight.detach().norm()) < 3.0
        head(torch.randn(1, 5, 8), torch.empty(0), torch.empty(0), make_text([0])).sum().backward()
        assert all(p.grad is not None for p in head.parameters())


def test_autocast_keeps_the_logits_in_float32():
    head, text = randomise(make_head(**ZSSEG)), make_text([0, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.randn(1, 5, 8), torch.empty(0), torch.empty(0), text).dtype == torch.float32
