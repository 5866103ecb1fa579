"""Mask-to-text contrastive learning (parity: mta_eq/mask_text_loss)."""

import math

import pytest
import torch

from ovseg_d2.modeling.losses.alignment import MaskTextAlignment, best_contexts
from ovseg_d2.structures import SegmentationTargets

N, Q, P, K, D = 2, 5, 3, 4, 6


def random_embeds(seed=0, contexts=P, classes=K):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randn(N, Q, D, generator=generator)
    return masks, torch.randn(N, contexts, classes, D, generator=generator)


def targets_of(*class_ids):
    return [SegmentationTargets(torch.tensor(ids, dtype=torch.int64), torch.zeros(len(ids), 2, 2)) for ids in class_ids]


def matches_of(*pairs):
    return [tuple(torch.tensor(indices, dtype=torch.int64) for indices in pair) for pair in pairs]


TARGETS = targets_of([2, 0], [1])
MATCHES = matches_of(([1, 4], [1, 0]), ([3], [0]))
#: image, query, class
MATCHED = [(0, 1, 0), (0, 4, 2), (1, 3, 1)]


@pytest.mark.parametrize("negatives", ["mix", "separate"])
def test_the_equations_one_by_one(negatives):
    masks, texts = random_embeds()
    total = 0.0
    for image, query, label in MATCHED:
        scores = torch.cosine_similarity(masks[image, query].expand(P, K, D), texts[image], dim=-1) / 0.2
        best = max(range(P), key=lambda k: scores[k, label].item())
        total += (
            -scores[best, label]
            + sum(
                scores[k, r].exp()
                for k in range(P)
                for r in range(K)
                if (k, r) == (best, label) or negatives == "mix" or r != label
            ).log()
        )
    for normaliser, count in (("queries", N * Q), ("matched", len(MATCHED))):
        alignment = MaskTextAlignment(negatives=negatives, normaliser=normaliser, temperature=0.2)
        torch.testing.assert_close(alignment(masks, texts, TARGETS, MATCHES), total / count)


def test_one_context_is_cross_entropy_in_both_ways():
    masks, texts = random_embeds(contexts=1)
    mix, separate = (
        MaskTextAlignment(negatives=negatives)(masks, texts, TARGETS, MATCHES) for negatives in ("mix", "separate")
    )
    torch.testing.assert_close(mix, separate)


def test_lengths_do_not_count_and_bfloat16_is_no_worse():
    masks, texts = random_embeds()
    alignment = MaskTextAlignment()
    expected = alignment(masks, texts, TARGETS, MATCHES)
    torch.testing.assert_close(alignment(3 * masks, 0.1 * texts, TARGETS, MATCHES), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = alignment(masks, texts, TARGETS, MATCHES)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("normaliser", ["queries", "matched"])
@pytest.mark.parametrize("negatives", ["mix", "separate"])
def test_no_match_is_a_connected_zero(negatives, normaliser):
    masks, texts = (embeds.requires_grad_() for embeds in random_embeds())
    alignment = MaskTextAlignment(negatives=negatives, normaliser=normaliser, learn_temperature=True)
    loss = alignment(masks, texts, targets_of([], []), matches_of(([], []), ([], [])))
    loss.backward()
    assert loss.item() == 0.0
    for tensor in (masks, texts, alignment.logit_scale):
        assert tensor.grad is not None and not tensor.grad.any()


def test_one_class_has_no_separate_negatives():
    masks, texts = random_embeds(classes=1)
    texts.requires_grad_()
    loss = MaskTextAlignment(negatives="separate")(masks, texts, targets_of([0], []), matches_of(([2], [0]), ([], [])))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6) and texts.grad.isfinite().all()


def test_the_best_context_is_the_nearest_of_the_class():
    logits = torch.tensor([[[0.0, 9.0], [2.0, 1.0], [1.0, 3.0]]]).expand(2, -1, -1)
    assert best_contexts(logits, torch.tensor([0, 1])).tolist() == [1, 0]


def test_a_learned_temperature_starts_where_it_is_told_and_has_a_bound():
    masks, texts = random_embeds()
    learned = MaskTextAlignment(temperature=0.2, learn_temperature=True)
    torch.testing.assert_close(
        learned.similarity(masks, texts), MaskTextAlignment(temperature=0.2).similarity(masks, texts)
    )
    with torch.no_grad():
        learned.logit_scale.fill_(math.log(1e6))
    assert learned.similarity(masks, texts).abs().max() <= 100.001
    assert "logit_scale" not in MaskTextAlignment().state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": "all"}, "MTA_CLIP.NEGATIVES is 'all'; allowed are mix, separate"),
        ({"normaliser": "masks"}, "MTA_CLIP.SIM_NORM is 'masks'; allowed are queries, matched"),
        ({"temperature": 0.0}, "MTA_CLIP.TEMPERATURE is 0.0; expected a positive"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MaskTextAlignment(**options)
