"""The cost head as a whole: batches, vocabularies of any size, the fast path."""

import logging

import pytest
import torch

from ovseg_d2.modeling.pixel_classification.class_rows import RULED_OUT_LOGIT, ClassRows
from ovseg_d2.modeling.pixel_classification.cost_decoder import CostDecoder, chosen_rows
from tests.modeling.tiny_cost_head import random_cost_input, tiny_cost_head

VARIANTS = {
    "whole": {},
    "fast": {"top_k": 1},
    "limit": {"max_classes": 4, "pad_length": 4},
    "fast, limit": {"top_k": 1, "max_classes": 4, "pad_length": 4},
    "softmax, add": {"attention": "full", "fusion": "add", "top_k": 2},
    "CAT-Seg": {"fusion": None, "aux_heads": False},
}


def single(inputs, image):
    dense, text, features = inputs
    return dense[image : image + 1], text[image : image + 1], [feature[image : image + 1] for feature in features]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_batch_equals_single_image(variant):
    head, inputs = tiny_cost_head(**VARIANTS[variant]), random_cost_input(3, 9)
    batch = head(*inputs)
    assert batch.logits.shape == (3, 9, 20, 28)
    for i in range(3):
        alone = head(*single(inputs, i))
        assert torch.equal(alone.kept[0], batch.kept[i]) and torch.equal(alone.attended[0], batch.attended[i])
        torch.testing.assert_close(alone.logits[0], batch.logits[i], rtol=1e-4, atol=1e-5)
    if "fast" in variant or "limit" in variant:  # images differ, or nothing was tested
        assert not torch.equal(batch.kept[0], batch.kept[1])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_classes_in_another_order(variant):
    """The padding is no class: its number, not its place, counts."""
    head, (dense, text, features) = tiny_cost_head(**VARIANTS[variant]), random_cost_input(2, 7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    maps, permuted = head(dense, text, features), head(dense, text[:, order], features)
    assert torch.equal(permuted.kept, maps.kept[:, order])
    torch.testing.assert_close(permuted.logits, maps.logits[:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", ["cat", "add", None])
@torch.no_grad()
def test_fast_with_as_many_as_there_are_classes(fusion):
    inputs = random_cost_input(2, 6)
    whole = tiny_cost_head(fusion=fusion)(*inputs)
    for top_k in (6, 99):
        fast = tiny_cost_head(fusion=fusion, top_k=top_k)(*inputs)
        assert fast.kept.all()
        torch.testing.assert_close(fast.logits, whole.logits)


@pytest.mark.parametrize("num_classes", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (4, 3)])
@torch.no_grad()
def test_few_classes_on_any_grid(num_classes, size):
    for options in VARIANTS.values():
        maps = tiny_cost_head(**options)(*random_cost_input(2, num_classes, size))
        assert maps.logits.shape == (2, num_classes, 4 * size[0], 4 * size[1]) and maps.logits.isfinite().all()
        assert maps.kept.any(dim=1).all()


@torch.no_grad()
def test_more_classes_than_the_limit(caplog):
    dense, text, features = random_cost_input(2, 11)
    head = tiny_cost_head(max_classes=5, pad_length=5)
    with caplog.at_level(logging.INFO, logger="ovseg_d2"):
        logging.getLogger("ovseg_d2").propagate = True
        maps = head(dense, text, features)
        head(dense, text, features)
        everything = tiny_cost_head(max_classes=0, pad_length=5)(dense, text, features)
        everything = tiny_cost_head(max_classes=0, pad_length=5)(dense, text, features)
    lines = [record.message for record in caplog.records if "11 classes" in record.message]
    assert len(lines) == 2 and "the 5 most similar ones" in lines[0] and "all attend" in lines[1]

    cosine = torch.einsum(
        "ndhw,nepd->nehwp", dense / dense.norm(dim=1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
    )
    best = cosine.flatten(2).amax(2).topk(5, dim=1).indices
    assert [set(ids.tolist()) for ids in best] == [set(row.nonzero()[:, 0].tolist()) for row in maps.attended]
    assert (maps.logits[~maps.kept] == RULED_OUT_LOGIT).all() and (maps.logits[maps.kept] != RULED_OUT_LOGIT).any()
    assert everything.kept.all() and not (everything.logits == RULED_OUT_LOGIT).any()
    # The chosen ones alone, without the others: the same.
    for i in range(2):
        ids = maps.kept[i].nonzero()[:, 0]
        alone = tiny_cost_head(max_classes=0, pad_length=5)(*single((dense, text[:, ids], features), i))
        torch.testing.assert_close(alone.logits[0], maps.logits[i, ids], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_limit_that_is_not_reached_changes_nothing():
    inputs = random_cost_input(2, 6)
    torch.testing.assert_close(
        tiny_cost_head(max_classes=6)(*inputs).logits, tiny_cost_head(max_classes=0)(*inputs).logits
    )


@torch.no_grad()
def test_nothing_computes_classes_that_were_ruled_out():
    """Each stage sees the rows that its predecessors left: pairs of image and class, fewer in every stage.
    The embedding sees all of them, to choose by, and once more those that were chosen."""
    head, inputs = tiny_cost_head(top_k=1), random_cost_input(2, 40, (3, 4))
    seen = {}
    modules = {"embedding": head.embedding.global_conv, "aggregation": head.aggregation.layers[0].spatial}
    modules |= {"stage 0": head.decoder.stages[0].up, "local": head.decoder.local_stage.up}
    modules |= {"stage 1": head.decoder.stages[1].up, "head": head.decoder.head}
    for name, module in modules.items():
        module.register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: seen.get(name, 0) + len(out)}))
    maps = head(*inputs)
    chosen = [logits.flatten(2).argmax(1) for logits in maps.aux_logits]
    expected = [sum(len(image.unique()) for image in winners) for winners in chosen]
    assert seen["embedding"] == 80 + expected[0] and 80 > expected[0] > expected[1] > expected[2]
    assert [seen["aggregation"], seen["stage 0"], seen["stage 1"]] == expected
    assert seen["local"] == seen["stage 0"] and seen["head"] == seen["stage 1"] == int(maps.kept.sum())


@torch.no_grad()
def test_pruned_rows_are_those_of_a_head_that_got_no_others():
    """Without padding, what survives every choice is computed as if it were the whole vocabulary."""
    dense, text, features = random_cost_input(1, 12, (3, 4))
    fast = tiny_cost_head(top_k=2, pad_length=0)(dense, text, features)
    first = (fast.aux_logits[0] > RULED_OUT_LOGIT).any(-1).any(-1)
    assert first.all() and 0 < fast.kept.sum() < 12
    survivors = (fast.aux_logits[1] > RULED_OUT_LOGIT).any(-1).any(-1)[0].nonzero()[:, 0]
    whole = tiny_cost_head(pad_length=0)(dense, text[:, survivors], features)
    kept = fast.kept[0, survivors]
    torch.testing.assert_close(fast.logits[0, survivors][kept], whole.logits[0, kept], rtol=1e-4, atol=1e-5)


def test_top_k_is_of_each_image_and_pixel():
    rows = ClassRows.of_mask(torch.tensor([[True, True, False, True], [False, True, True, False]]))
    logits = torch.tensor([[3.0, 0.0], [2.0, 9.0], [1.0, 1.0], [0.0, 0.0], [5.0, 5.0]])[:, None]
    assert chosen_rows(rows, logits, 1).tolist() == [True, True, False, False, True]
    assert chosen_rows(rows, logits, 2).all()


@torch.no_grad()
def test_chunks_change_nothing():
    head, inputs = tiny_cost_head(top_k=2), random_cost_input(2, 9)
    whole = head(*inputs).logits
    for module in (head.embedding, head.decoder, *head.aggregation.layers):
        module.chunk_size = 4
    torch.testing.assert_close(head(*inputs).logits, whole)


@pytest.mark.parametrize("options", [*VARIANTS.values(), {"attention": "full", "pad_length": 3}])
def test_training_reaches_every_parameter(options):
    """No class is ruled out by the fast path; also where the vocabulary needs no padding."""
    head = tiny_cost_head(**options).train()
    dense, text, features = random_cost_input(2, 5)
    maps = head(dense.requires_grad_(), text.requires_grad_(), features)
    assert torch.equal(maps.kept, maps.attended)
    shapes = [(2, 5, 5, 7), (2, 5, 5, 7), (2, 5, 10, 14)] if head.aux_head is not None else []
    assert [logits.shape for logits in maps.aux_logits] == shapes
    sum(logits.sigmoid().mean() for logits in (maps.logits, *maps.aux_logits)).backward()
    assert dense.grad.isfinite().all() and text.grad.abs().sum() > 0
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@torch.no_grad()
def test_prompts_of_a_class_count_alike():
    head = tiny_cost_head(num_prompts=3, fusion=None)
    dense, text, features = random_cost_input(2, 6, num_prompts=3)
    logits = head(dense, text, features).logits
    assert logits.shape == (2, 6, 20, 28)
    same = head(dense, text * torch.rand(2, 6, 3, 1).add(0.5), features).logits  # whatever the texts' length
    torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-5)
    shared = head(dense, text[:1], features).logits
    torch.testing.assert_close(shared[0], logits[0], rtol=1e-4, atol=1e-5)


def test_bad_options():
    with pytest.raises(ValueError, match="MAX_CLASSES is -1; expected 0 or more"):
        tiny_cost_head(max_classes=-1)
    with pytest.raises(ValueError, match="TOP_K is 4, but there are no auxiliary heads"):
        tiny_cost_head(top_k=4, aux_heads=False)
    with pytest.raises(ValueError, match="DECODER_DIMS has 24; expected multiples of 16"):
        CostDecoder(dims=(24, 16))
    with pytest.raises(ValueError, match=r"DECODER_DIMS is \[64\]"):
        CostDecoder(dims=(64,))
