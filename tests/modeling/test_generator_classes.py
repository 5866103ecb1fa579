"""What a generator says of classes, closed or open, and equation 4 of MaskCLIP++ on its own vocabulary."""

import pytest
import torch
from detectron2.data import MetadataCatalog

from ovseg_d2.modeling.mask_classification.generator_classes import GeneratorClasses
from ovseg_d2.structures import MaskProposals, Vocabulary
from tests.helpers import tiny_cfg

TRAINED = Vocabulary(
    names=("person", "car", "bus", "sky"),
    is_thing=(True, True, True, False),
    synonyms=(("person", "child"), ("car",), ("bus",), ("sky", "clouds")),
)
TEST = Vocabulary(
    names=("wall", "vehicle", "man"),
    is_thing=(False, True, True),
    synonyms=(("wall",), ("vehicle", "bus", "car"), ("man", "child")),
)
SEEN = [False, True, True]


def logits(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def registered():
    """A dataset with the classes of ``TRAINED``, of which a zero-shot split left one out."""
    MetadataCatalog.get("tiny_trained").set(
        thing_classes=list(TRAINED.names),
        class_synonyms=TRAINED.synonyms,
        class_is_seen=[True, True, True, False],
    )
    yield "tiny_trained"
    MetadataCatalog.remove("tiny_trained")


def config(dataset, *, closed=True, name="maskclippp", num_classes=4):
    cfg = tiny_cfg(num_classes)
    cfg.DATASETS.TRAIN = (dataset,) if dataset else ()
    ovseg = cfg.MODEL.OVSEG
    ovseg.PROPOSALS.CLASS_HEAD = "linear" if closed else "text"
    ovseg.ENSEMBLE.NAME, ovseg.ENSEMBLE.ALPHA, ovseg.ENSEMBLE.BETA = name, 0.6, 1.0
    return cfg


def test_seen_is_relative_to_the_generators_training():
    split = Vocabulary(TEST.names, TEST.is_thing, TEST.synonyms, is_seen=(True, False, False))
    for vocabulary in (TEST, split):
        assert GeneratorClasses(trained=TRAINED).seen(vocabulary).tolist() == SEEN
    # Of its own training's split, what was left out is not seen.
    trained = Vocabulary(TRAINED.names, TRAINED.is_thing, TRAINED.synonyms, is_seen=(False, True, True, True))
    assert GeneratorClasses(trained=trained).seen(TEST).tolist() == [False, True, False]


def test_probabilities_of_an_open_generator():
    x = logits(2, 5, 4)
    proposal_probs, void_probs = GeneratorClasses(trained=TRAINED).probs(x, TEST)
    torch.testing.assert_close(proposal_probs, x[..., :3].softmax(-1))
    torch.testing.assert_close(void_probs, x.softmax(-1)[..., 3])


def test_probabilities_of_a_closed_generator():
    """Two of its classes are one of the test's, one is none of them, and "wall" is none of its."""
    x = logits(2, 5, 5)
    translated = torch.stack([0 * x[..., 0], x[..., 1:3].mean(-1), x[..., 0], x[..., 3:].mean(-1)], dim=-1)
    proposal_probs, void_probs = GeneratorClasses(trained=TRAINED, closed=True).probs(x, TEST)
    torch.testing.assert_close(proposal_probs, translated[..., :3].softmax(-1))
    torch.testing.assert_close(void_probs, translated.softmax(-1)[..., 3])


@pytest.mark.parametrize("beta", [1.0, 0.7])
def test_equation_4(beta):
    gamma, clip_logits, x = 0.4, logits(2, 5, 3, seed=1), logits(2, 5, 4)
    classes = GeneratorClasses(trained=TRAINED, name="maskclippp", alpha=1 - gamma, beta=beta)
    probs = classes.combine(clip_logits, MaskProposals(mask_logits=x, class_logits=x), TEST).softmax(-1)
    ps, pc, void = x[..., :3].softmax(-1), clip_logits.softmax(-1), x.softmax(-1)[..., 3:]
    exponents = torch.where(torch.tensor(SEEN), gamma, 1 - beta)
    expected = ps**exponents * pc ** (1 - exponents)
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(probs, torch.cat([expected * (1 - void), void], dim=-1), rtol=1e-4, atol=1e-6)


def test_without_ensemble_the_generator_says_what_is_no_object():
    clip_logits, x = logits(1, 5, 3, seed=1), logits(1, 5, 4)
    proposals = MaskProposals(mask_logits=x, class_logits=x)
    probs = GeneratorClasses().combine(clip_logits, proposals, TEST).softmax(-1)
    void = x.softmax(-1)[..., 3:]
    torch.testing.assert_close(probs, torch.cat([clip_logits.softmax(-1) * (1 - void), void], dim=-1))


def test_masks_without_classes():
    """Each is an object, but for the rows that fill the batch."""
    clip_logits = logits(2, 3, 3)
    valid = torch.tensor([[True, True, False], [False, False, False]])
    probs = GeneratorClasses().combine(clip_logits, MaskProposals(logits(2, 3, 4, 4), valid=valid), TEST).softmax(-1)
    torch.testing.assert_close(probs[valid][:, :3], clip_logits.softmax(-1)[valid], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(probs[~valid][:, 3], torch.ones(4), rtol=0, atol=1e-6)
    assert GeneratorClasses().probs(None, TEST) == (None, None)


def test_two_vocabularies_and_batches_of_one():
    classes = GeneratorClasses(trained=TRAINED, closed=True, name="maskclippp", alpha=0.6)
    x = logits(2, 5, 5)
    for vocabulary in (TEST, TRAINED, TEST):
        clip_logits = logits(2, 5, len(vocabulary), seed=2)
        both = classes.combine(clip_logits, MaskProposals(x, class_logits=x), vocabulary)
        assert both.shape == (2, 5, len(vocabulary) + 1)
        for i in range(2):
            one = MaskProposals(x[i : i + 1], class_logits=x[i : i + 1])
            torch.testing.assert_close(classes.combine(clip_logits[i : i + 1], one, vocabulary)[0], both[i])


def test_from_config(registered):
    classes = GeneratorClasses.from_config(config(registered), has_classes=True)
    assert (classes.closed, classes.name, classes.alpha, classes.beta) == (True, "maskclippp", 0.6, 1.0)
    assert classes.seen(TRAINED).tolist() == [True, True, True, False]
    cfg = config("")
    cfg.MODEL.OVSEG.PROPOSALS.DATASET = registered
    assert GeneratorClasses.from_config(cfg, has_classes=True).trained == classes.trained
    # A text head has no size; without ensemble nobody asks what it was trained on.
    assert not GeneratorClasses.from_config(config(registered, closed=False, num_classes=9), has_classes=True).closed
    assert GeneratorClasses.from_config(config("", name="none"), has_classes=False).trained is None


@pytest.mark.parametrize(
    ("options", "has_classes", "message"),
    [
        ({"num_classes": 7}, True, "DATASETS.TRAIN tiny_trained has 4 classes, but the class head of Mask.* has 7"),
        ({"name": "zsseg"}, True, "ENSEMBLE.NAME is 'zsseg'; allowed are none, maskclippp"),
        ({}, False, "ENSEMBLE.NAME is 'maskclippp', but Mask2FormerProposals .* has no classes; expected 'none'"),
        ({"dataset": "", "closed": False}, True, "PROPOSALS.DATASET: .* not known, which MODEL.OVSEG.ENSEMBLE.NAME"),
        ({"dataset": "", "name": "none"}, True, "PROPOSALS.DATASET: .* which a generator with a closed vocabulary"),
    ],
)
def test_bad_input(registered, options, has_classes, message):
    cfg = config(**{"dataset": registered} | options)
    with pytest.raises(ValueError, match=message) as error:
        GeneratorClasses.from_config(cfg, has_classes=has_classes)
    assert "\n" not in str(error.value)


def test_more_bad_input(registered):
    cfg = config(registered)
    cfg.MODEL.OVSEG.PROPOSALS.DATASET = "nowhere"
    with pytest.raises(ValueError, match="PROPOSALS.DATASET: 'nowhere' is no registered dataset"):
        GeneratorClasses.from_config(cfg, has_classes=True)
    cfg = config(registered)
    cfg.MODEL.OVSEG.ENSEMBLE.ALPHA = 1.2
    with pytest.raises(ValueError, match="ENSEMBLE.ALPHA is 1.2; expected a number from 0 to 1"):
        GeneratorClasses.from_config(cfg, has_classes=True)
