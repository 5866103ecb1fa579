"""FC-CLIP: training, evaluation, any vocabulary at any time, odd inputs."""

import pytest
import torch
from detectron2.modeling import build_model

from ovseg_d2.modeling.layers.mask_pooling import downsample_masks
from ovseg_d2.modeling.text_classifier import averaged
from ovseg_d2.structures import Vocabulary
from tests.helpers import randomise, tiny_cfg
from tests.modeling.tiny_fcclip import COLOURS, fcclip_cfg, inputs, random_fcclip

OTHERS = Vocabulary(names=("tree", "brick", "sand"), is_thing=(False, False, True))
ONE = Vocabulary(names=("red star",), is_thing=(True,))


@pytest.fixture(scope="module")
def model():
    return random_fcclip()


def sem_seg(model, batch):
    with torch.no_grad():
        return [result["sem_seg"] for result in model.eval()(batch)]


@pytest.mark.parametrize("num_masks", [3, 0], ids=["targets", "no targets"])
def test_training_reaches_every_parameter_but_clip(model, num_masks):
    model.train().zero_grad()
    losses = model(inputs((33, 70), (64, 41), num_masks=num_masks))
    assert len(losses) == 9 and all(loss.isfinite() and loss.dim() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert {name.split(".")[0] for name in trained} == {"proposals"}
    assert all(p.grad is None for p in model.clip.parameters())
    if num_masks:
        void = model.proposals.mask_decoder.class_embed.void_embedding.weight
        assert float(void.grad.abs().sum()) > 0


def test_training_steps_lower_the_loss():
    torch.manual_seed(0)
    model = build_model(fcclip_cfg()).train()
    before = [p.clone() for p in model.clip.state_dict().values()]
    batch = inputs((64, 64), (64, 48))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    totals = []
    for _ in range(25):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert sum(totals[-5:]) < 0.8 * sum(totals[:5])
    # Neither weights nor the moving statistics of batch norms.
    assert all(torch.equal(a, b) for a, b in zip(before, model.clip.state_dict().values(), strict=True))


def test_clip_stays_in_evaluation_mode(model):
    assert not any(module.training for module in model.train().clip.modules())
    assert model.proposals.training and model.text_classifier.training


@torch.no_grad()
@pytest.mark.parametrize("vocabulary", [COLOURS, OTHERS, ONE], ids=["four", "three", "one"])
def test_results_follow_the_vocabulary(model, vocabulary):
    batch = inputs((33, 70), (64, 41), vocabulary=vocabulary)
    batch[0] |= {"height": 50, "width": 99}
    for x, result in zip(batch, model.eval()(batch), strict=True):
        assert result["sem_seg"].shape == (len(vocabulary), x["height"], x["width"])
        assert result["sem_seg"].isfinite().all()
        assert result["panoptic_seg"][0].shape == (x["height"], x["width"])
        assert all(vocabulary.is_thing[label] for label in result["instances"].pred_classes.tolist())


@pytest.mark.parametrize("vocabulary", [OTHERS, ONE])
def test_training_follows_the_vocabulary(model, vocabulary):
    losses = model.train()(inputs((40, 40), vocabulary=vocabulary))
    assert all(loss.isfinite() for loss in losses.values())


def test_batch_equals_single(model):
    batch = inputs((64, 40), (64, 40))
    for x, together in zip(batch, sem_seg(model, batch), strict=True):
        torch.testing.assert_close(together, sem_seg(model, [x])[0], rtol=1e-4, atol=1e-5)


def test_permuted_classes_permute_the_results(model):
    order = [2, 0, 3, 1]
    columns = (COLOURS.names, COLOURS.is_thing, COLOURS.synonyms)
    permuted = Vocabulary(*(tuple(column[i] for i in order) for column in columns))
    before = sem_seg(model, inputs((48, 64)))[0]
    after = sem_seg(model, inputs((48, 64), vocabulary=permuted))[0]
    torch.testing.assert_close(after, before[order], rtol=1e-4, atol=1e-6)
    assert float((before - before.mean(0)).abs().max()) > 1e-3  # the classes are told apart


@torch.no_grad()
def test_a_further_synonym_never_lowers_its_logit(model):
    plain = Vocabulary(names=("red star", "grass"), is_thing=(True, False))
    richer = Vocabulary(plain.names, plain.is_thing, (("red star", "blue ring"), ("grass",)))
    logits = []
    images = model.eval().preprocess(inputs((40, 56)))
    features = model.clip_features(images)
    for vocabulary in (plain, richer):
        text = model.text(vocabulary)
        assert len(text.embeds) == sum(map(len, vocabulary.synonyms))
        logits.append(model.proposals(images, features, averaged(text)).class_logits)
    assert (logits[1][..., 0] >= logits[0][..., 0] - 1e-5).all()
    torch.testing.assert_close(logits[1][..., 1:], logits[0][..., 1:])


def test_two_vocabularies_in_one_process():
    """Train with A, evaluate A, then B: as a new model that only ever saw B."""
    model = random_fcclip()
    sum(model.train()(inputs((40, 40))).values()).backward()
    batch_a, batch_b = inputs((48, 48)), inputs((48, 48), vocabulary=OTHERS)
    first = sem_seg(model, batch_a)[0]
    fresh = random_fcclip()
    torch.testing.assert_close(sem_seg(model, batch_b)[0], sem_seg(fresh, batch_b)[0])
    torch.testing.assert_close(sem_seg(model, batch_a)[0], first)
    mixed = sem_seg(model, [batch_a[0], batch_b[0]])
    torch.testing.assert_close(mixed[0], first, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mixed[1], sem_seg(fresh, batch_b)[0], rtol=1e-4, atol=1e-6)


def test_seen_classes_are_those_of_the_training(model):
    model.text_classifier.trained_vocabulary = OTHERS
    assert model.text(COLOURS).seen.tolist() == [False, False, False, True]
    unseen = sem_seg(model, inputs((40, 40)))[0]
    model.text_classifier.trained_vocabulary = COLOURS
    seen = sem_seg(model, inputs((40, 40)))[0]
    assert float((seen - unseen).abs().max()) > 1e-4
    model.text_classifier.trained_vocabulary = None


@torch.no_grad()
def test_masks_that_clip_cannot_see_are_left_to_the_generator(model):
    model.eval()
    images = model.preprocess(inputs((64, 64)))
    features = model.clip_features(images)
    text = averaged(model.text(COLOURS))
    proposals = model.proposals(images, features, text)
    proposals.mask_logits[:, 0] = -1.0
    proposals.mask_logits[:, 1, 3, 3] = 9.0
    proposals.mask_logits[:, 2] = 1.0
    visible = (downsample_masks(proposals.mask_logits, features.grid) > 0).flatten(2).any(-1)[0]
    assert visible[2] and not visible[0]
    both = model.ensemble(proposals, features, text)
    model.ensemble_valid_masks_only = True
    result = model.ensemble(proposals, features, text)
    model.ensemble_valid_masks_only = False
    torch.testing.assert_close(result[:, visible], both[:, visible])
    alone = proposals.class_logits.log_softmax(-1)
    torch.testing.assert_close(result[:, ~visible], alone[:, ~visible], rtol=1e-3, atol=1e-3)
    assert float((both[:, 0] - alone[:, 0]).abs().max()) > 1e-2


@torch.no_grad()
def test_autocast(model):
    batch = inputs((64, 48))
    expected = sem_seg(model, batch)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sem_seg(model, batch)[0]
    assert got.isfinite().all() and float((got - expected).abs().mean()) < 0.1 * float(expected.abs().mean())


def test_text_head_on_a_backbone_of_its_own():
    cfg = fcclip_cfg()
    cfg.MODEL.OVSEG.PROPOSALS.NAME = "Mask2FormerProposals"
    model = randomise(build_model(cfg))
    assert all(loss.isfinite() for loss in model.train()(inputs((64, 64))).values())
    assert sem_seg(model, inputs((40, 40), vocabulary=OTHERS))[0].shape == (3, 40, 40)


def test_bad_inputs(model):
    batch = inputs((32, 32), (32, 32))
    batch[1]["vocabulary"] = OTHERS
    with pytest.raises(ValueError, match="2 different vocabularies"):
        model.train()(batch)
    del batch[0]["vocabulary"]
    for mode in (True, False):
        with pytest.raises(ValueError, match="no class names"):
            model.train(mode)(batch[:1])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("CLIP.TRAINABLE", "full", "CLIP.TRAINABLE: got 'full'"),
        ("CLIP.NAME", "OVShapes-ViT", "IN_FEATURES.*are not among the outputs of .*OVShapes-ViT"),
        ("PROPOSALS.CLASS_HEAD", "linear", "CLASS_HEAD: got 'linear'; FC-CLIP needs 'text'"),
        ("PROPOSALS.NAME", "PrecomputedProposals", "masks of PrecomputedProposals have no classes"),
        ("PROPOSALS.NAME", "FCClip", "PROPOSALS.NAME.*FCClip.*FCCLIPProposals"),
    ],
)
def test_bad_configurations(key, value, message):
    cfg = fcclip_cfg()
    cfg.merge_from_list([f"MODEL.OVSEG.{key}", value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("NAME", "FCCLIPProposals", "FCCLIPProposals needs a model with CLIP"),
        ("CLASS_HEAD", "text", "'text' needs a model with CLIP"),
        ("CLASS_HEAD", "cosine", "CLASS_HEAD: got 'cosine'; allowed are linear, text"),
    ],
)
def test_parts_that_need_clip(key, value, message):
    cfg = tiny_cfg()
    cfg.merge_from_list([f"MODEL.OVSEG.PROPOSALS.{key}", value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)
