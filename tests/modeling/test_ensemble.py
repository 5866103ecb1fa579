"""Ensembles: the formula, its published forms, and probabilities at the ends of their range."""

import pytest
import torch

from ovseg_d2.modeling.mask_classification import ensemble
from ovseg_d2.structures import Vocabulary

SEEN = torch.tensor([True, False, True, False])


def probabilities(*shape, seed=0):
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).softmax(-1)


@pytest.fixture
def proposal_probs():
    return probabilities(2, 5, 4)


@pytest.fixture
def clip_probs():
    return probabilities(2, 5, 4, seed=1)


def test_formula(proposal_probs, clip_probs):
    result = ensemble.geometric_ensemble(proposal_probs, clip_probs, SEEN, alpha=0.4, beta=0.8)
    for k, exponent in enumerate([0.4, 0.8, 0.4, 0.8]):
        expected = proposal_probs[..., k] ** (1 - exponent) * clip_probs[..., k] ** exponent
        torch.testing.assert_close(result[..., k], expected)


@pytest.mark.parametrize(("weight", "expected"), [(0.0, "proposal_probs"), (1.0, "clip_probs")])
def test_ends_are_the_two_opinions(proposal_probs, clip_probs, weight, expected):
    result = ensemble.geometric_ensemble(proposal_probs, clip_probs, SEEN, alpha=weight, beta=weight)
    torch.testing.assert_close(result, locals()[expected])


def test_exponents_of_every_mask(proposal_probs, clip_probs):
    """Rows with exponent 0 are the generator's, whatever CLIP says."""
    judged = torch.ones(2, 5, 1)
    judged[0, 1] = judged[1, 4] = 0.0
    clip_probs[0, 1], clip_probs[1, 4] = torch.nan, 0.0
    result = ensemble.geometric_ensemble(proposal_probs, clip_probs, SEEN, alpha=0.4 * judged, beta=0.8 * judged)
    torch.testing.assert_close(result[0, 1], proposal_probs[0, 1])
    torch.testing.assert_close(result[1, 4], proposal_probs[1, 4])
    expected = ensemble.geometric_ensemble(proposal_probs, clip_probs, SEEN, alpha=0.4, beta=0.8)
    torch.testing.assert_close(result[0, 2:], expected[0, 2:])


def test_unseen_by_clip_alone(proposal_probs, clip_probs):
    options = {"alpha": 0.3, "beta": 0.7}
    result = ensemble.geometric_ensemble(proposal_probs, clip_probs, SEEN, **options, unseen_by_clip_alone=True)
    torch.testing.assert_close(result[..., ~SEEN], clip_probs[..., ~SEEN] ** 0.7)
    both = ensemble.geometric_ensemble(proposal_probs, clip_probs, SEEN, **options)
    torch.testing.assert_close(result[..., SEEN], both[..., SEEN])


@pytest.mark.parametrize(("alpha", "beta"), [(0.4, 0.8), (0.0, 1.0), (0.0, 0.0), (1.0, 1.0)])
def test_probabilities_of_zero_and_one(alpha, beta):
    """Opinions that exclude each other leave nothing; the result is finite all the same."""
    eye = torch.eye(4)
    probs = ensemble.geometric_ensemble(eye, eye.roll(1, 0), SEEN, alpha=alpha, beta=beta)
    assert ((probs >= 0) & (probs <= 1)).all()
    result = ensemble.with_void(ensemble.normalised_logits(probs), torch.tensor([0.0, 1.0, 0.5, 1e-30]))
    assert result.isfinite().all()
    torch.testing.assert_close(result.exp().sum(-1), torch.ones(4))


def test_void_keeps_its_probability(proposal_probs):
    void = torch.linspace(0, 1, 10).view(2, 5)
    result = ensemble.with_void(proposal_probs.log() + 7.0, void)
    torch.testing.assert_close(result.softmax(-1)[..., -1], void, atol=1e-6, rtol=0)
    torch.testing.assert_close(result.exp()[..., :-1], proposal_probs * (1 - void[..., None]), atol=1e-6, rtol=0)


def test_half_precision_is_computed_in_float32(proposal_probs, clip_probs):
    result = ensemble.geometric_ensemble(proposal_probs.bfloat16(), clip_probs.bfloat16(), SEEN, alpha=0.4, beta=0.8)
    assert result.dtype == torch.float32


def test_one_class():
    one = torch.ones(3, 1)
    result = ensemble.geometric_ensemble(one, one, torch.tensor([False]), alpha=0.4, beta=0.8)
    logits = ensemble.with_void(ensemble.normalised_logits(result), torch.full((3,), 0.25))
    torch.testing.assert_close(logits.exp(), torch.tensor([[0.75, 0.25]]).expand(3, 2))


def test_average_over_seen(clip_probs):
    result = ensemble.averaged_over_seen(clip_probs, SEEN)
    torch.testing.assert_close(result[..., 0], (clip_probs[..., 0] + clip_probs[..., 2]) / 2)
    torch.testing.assert_close(result[..., 2], result[..., 0])
    assert torch.equal(result[..., ~SEEN], clip_probs[..., ~SEEN])
    assert torch.equal(ensemble.averaged_over_seen(clip_probs, torch.zeros(4, dtype=torch.bool)), clip_probs)


def test_logits_of_another_vocabulary():
    trained = Vocabulary(
        names=("person", "car", "bus", "table"),
        is_thing=(True,) * 4,
        synonyms=(("person", "child"), ("car",), ("bus",), ("table",)),
    )
    vocabulary = Vocabulary(
        names=("wall", "vehicle", "child", "person"),
        is_thing=(False, True, True, True),
        synonyms=(("wall",), ("vehicle", "car", "bus"), ("child",), ("person",)),
    )
    table = ensemble.class_table(trained, vocabulary)
    assert table.tolist() == [2, 1, 1, 4, 4]  # the first that fits; table is none of them, nor is "no object"
    logits = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
    result = ensemble.translated_logits(logits, table, len(vocabulary))
    assert result.tolist() == [[0.0, 3.0, 1.0, 0.0, 12.0]]
