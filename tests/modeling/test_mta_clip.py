"""MTA-CLIP: training, evaluation, other vocabularies, and Mask2Former where nothing is asked for."""

import math
from dataclasses import replace

import pytest
import torch
from detectron2.modeling import build_model

from ovseg_d2.checkpoint.checkpointer import Checkpointer
from ovseg_d2.engine.optimizer import parameter_groups
from ovseg_d2.structures import Vocabulary
from tests.helpers import numbered_vocabulary
from tests.modeling.tiny_fcclip import COLOURS, inputs
from tests.modeling.tiny_mta_clip import mta_cfg, random_mta

SIZES = ((33, 70), (64, 41))
PLAIN = {"TEXT_ENHANCED": False}
OPEN = {"SCORE": "similarity"}


@pytest.fixture(scope="module")
def model():
    return random_mta()


@pytest.fixture(scope="module")
def open_model():
    return random_mta(mta_cfg(**OPEN))


def matching_cfg():
    """Figure 2: masks are matched with fixed texts."""
    cfg = mta_cfg(**PLAIN)
    cfg.MODEL.OVSEG.PROPOSALS.CLASS_HEAD = "embed"
    return cfg


def test_without_texts_it_is_mask2former():
    cfg = mta_cfg(**PLAIN)
    torch.manual_seed(3)
    plain = build_model(cfg).train()
    cfg.MODEL.META_ARCHITECTURE = "Mask2Former"
    torch.manual_seed(3)
    mask2former = build_model(cfg).train()
    weights, expected = plain.state_dict(), mask2former.state_dict()
    assert list(weights) == list(expected) and all(torch.equal(weights[name], expected[name]) for name in weights)
    losses, expected = plain(inputs(*SIZES)), mask2former(inputs(*SIZES))
    assert losses == expected
    results, expected = plain.eval()(inputs(*SIZES)), mask2former.eval()(inputs(*SIZES))
    assert all(torch.equal(a["sem_seg"], b["sem_seg"]) for a, b in zip(results, expected, strict=True))


def test_the_same_seed_gives_the_same_generator_with_texts():
    weights = []
    for options in (PLAIN, {}):
        torch.manual_seed(3)
        weights.append(build_model(mta_cfg(**options)).proposals.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


CASES = {
    "default": {},
    "one context": {"NUM_CONTEXTS": 1},
    "separate negatives": {"NEGATIVES": "separate", "SIM_NORM": "matched", "LEARN_TEMPERATURE": True},
    "no alignment": {"LOSS_WEIGHT": 0.0},
    "fixed texts": {"LEARN_CONTEXTS": False},
    "separate attention": {"SEPARATE_ATTENTION": True},
    "own projections": {"PER_LAYER_PROJ": True, "TEXT_INPUT_NORM": True},
    "no texts": PLAIN,
    "similarity": OPEN,
}


@pytest.mark.parametrize("num_masks", [3, 0], ids=["targets", "no targets"])
@pytest.mark.parametrize("case", [*CASES, "matching"])
def test_training_reaches_every_parameter(case, num_masks):
    model = random_mta(matching_cfg() if case == "matching" else mta_cfg(**CASES[case])).train()
    losses = model(inputs(*SIZES, num_masks=num_masks))
    aligned = case not in ("no alignment", "no texts", "matching")
    # Two decoder layers, and the queries before them, which no text has met.
    assert {name for name in losses if "align" in name} == ({"loss_align", "loss_align_1"} if aligned else set())
    assert len(losses) == 9 + 2 * aligned and all(loss.isfinite() and loss.dim() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert not any(name.startswith("clip.") for name in trained)
    if num_masks and "context_prompts.contexts" in trained:
        assert trained["context_prompts.contexts"].grad.flatten(1).any(dim=1).all()


def test_only_what_is_asked_for_is_built():
    def parts(**options):
        return {name.split(".")[0] for name in build_model(mta_cfg(**options)).state_dict()}

    assert parts(**PLAIN) == {"proposals"}
    assert parts(LOSS_WEIGHT=0.0) == {"proposals", "clip", "text_queries", "context_prompts"}
    assert parts(LEARN_CONTEXTS=False) == {"proposals", "clip", "text_queries", "projections"}
    names = set(build_model(mta_cfg()).state_dict())
    assert not any(name.startswith("clip.visual") for name in names)
    assert {name.split(".")[1] for name in names if name.startswith("projections")} == {"0"}
    own = build_model(mta_cfg(PER_LAYER_PROJ=True, CONTEXT_INIT_STD=1.0))
    assert own.context_prompts.contexts.std() > 0.5
    assert len(own.projections) == len(own.proposals.mask_decoder.layers) == 2


def test_alignment_has_its_weight_and_each_layers_own_matches(monkeypatch):
    model = random_mta(mta_cfg(LOSS_WEIGHT=0.5)).train()
    found, calls = [], []
    criterion = model.criterion.losses_and_matches
    monkeypatch.setattr(model.criterion, "losses_and_matches", lambda *args: found.append(criterion(*args)) or found[0])
    model.alignment.register_forward_hook(lambda module, args, loss: calls.append((args, loss)))
    losses = model(inputs(*SIZES))
    matches = found[0][1]
    # Those of the queries that no text has met are not used.
    assert len(matches) == 3 and [args[3] for args, _ in calls] == matches[1:]
    for (args, loss), name in zip(calls, ("loss_align_1", "loss_align"), strict=True):
        assert args[0].shape == (2, 6, 128) and args[1].shape == (2, 2, 4, 128)
        torch.testing.assert_close(losses[name], 0.5 * loss)


def losses_with(model, **options):
    """The losses of a model with ``options`` and the weights of ``model``, and the model."""
    other = build_model(mta_cfg(**options)).train()
    other.load_state_dict(model.state_dict(), strict=False)
    return other(inputs(*SIZES)), other


@pytest.fixture(scope="module")
def default_losses(model):
    return losses_with(model)[0]


def test_keys_of_the_alignment_change_its_loss_and_no_other(model, default_losses):
    options = {"NEGATIVES": "separate", "SIM_NORM": "matched", "TEMPERATURE": 0.2}
    changed = {key: losses_with(model, **{key: value})[0] for key, value in options.items()}
    for name, loss in default_losses.items():
        others = {key: losses[name] for key, losses in changed.items()}
        if "align" not in name:
            assert all(torch.equal(other, loss) for other in others.values())
            continue
        assert others["NEGATIVES"] < loss  # fewer terms below the fraction
        torch.testing.assert_close(others["SIM_NORM"], loss * 12 / 6)  # two images of 6 queries and 3 masks each
        assert not torch.allclose(others["TEMPERATURE"], loss)


def test_a_learned_temperature_starts_as_the_fixed_one_and_trains(model, default_losses):
    losses, learned = losses_with(model, LEARN_TEMPERATURE=True)
    torch.testing.assert_close(losses, default_losses)
    scale = learned.alignment.logit_scale
    assert scale.item() == pytest.approx(-math.log(0.07))
    (losses["loss_align"] + losses["loss_align_1"]).backward()
    assert scale.grad != 0
    with torch.no_grad():
        scale -= scale.grad.sign()
    assert learned(inputs(*SIZES))["loss_align"] < default_losses["loss_align"]


@torch.no_grad()
def test_each_class_has_a_text_a_context(model):
    for num_contexts, m in ((2, model), (3, random_mta(mta_cfg(NUM_CONTEXTS=3)))):
        proposals, embeds = m.eval().propose(m.preprocess(inputs((48, 64))), COLOURS)
        assert embeds.shape == (num_contexts, 4, 128) and proposals.text_queries.shape[:2] == (1, num_contexts * 4)
        texts = torch.nn.functional.normalize(embeds.flatten(0, 1), dim=-1)
        assert (texts @ texts.T - torch.eye(len(texts))).max() < 0.9999


def test_training_steps_lower_the_loss():
    torch.manual_seed(0)
    model = build_model(mta_cfg()).train()
    batch = inputs((64, 64), (64, 48))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    totals = []
    for _ in range(20):
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        totals.append(torch.stack([sum(losses.values()), losses["loss_align"]]).detach())
    first, last = torch.stack(totals[:4]).sum(0), torch.stack(totals[-4:]).sum(0)
    assert (last < 0.85 * first).all()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, OPEN, {"SEPARATE_ATTENTION": True}], ids=str)
def test_results_and_batches(options):
    model = random_mta(mta_cfg(**options)).eval()
    batch = inputs(*SIZES)
    batch[0] |= {"height": 50, "width": 99}
    for x, result in zip(batch, model(batch), strict=True):
        size = (x["height"], x["width"])
        assert result["sem_seg"].shape == (4, *size) and result["panoptic_seg"][0].shape == size
        assert result["instances"].pred_masks.shape[1:] == size
    batch = inputs((64, 40), (64, 40))
    for x, result in zip(batch, model(batch), strict=True):
        torch.testing.assert_close(result["sem_seg"], model([x])[0]["sem_seg"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_texts_change_the_masks_unless_they_attend_apart():
    batch = inputs((48, 64))
    renamed = Vocabulary(names=("green ring", "tile", "wood", "red ring"), is_thing=COLOURS.is_thing)
    for separate in (False, True):
        model = random_mta(mta_cfg(SEPARATE_ATTENTION=separate)).eval()
        before, after = (model([batch[0] | {"vocabulary": v}])[0]["sem_seg"] for v in (COLOURS, renamed))
        assert torch.equal(after, before) == separate
        assert separate or (after - before).abs().max() > 1e-5


@torch.no_grad()
def test_permuted_vocabulary_permutes_the_result(open_model):
    order = [2, 0, 3, 1]
    permuted = Vocabulary(
        names=tuple(COLOURS.names[i] for i in order), is_thing=tuple(COLOURS.is_thing[i] for i in order)
    )
    x = inputs((48, 64))[0]
    before, after = (open_model.eval()([x | {"vocabulary": v}])[0]["sem_seg"] for v in (COLOURS, permuted))
    assert (before[0] - before[1]).abs().max() > 1e-4
    torch.testing.assert_close(after, before[order], rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: random_mta(mta_cfg(**OPEN)), lambda: random_mta(matching_cfg())])
def test_other_vocabularies_where_texts_score(make):
    model = make().eval()
    wide = Vocabulary(names=("red star", "sky", "tile", "wood", "white heart", "sand"), is_thing=(True,) + (False,) * 5)
    one = Vocabulary(names=("grass",), is_thing=(False,))
    batch = inputs((48, 48), (48, 48), (48, 48))
    batch[1]["vocabulary"], batch[2]["vocabulary"] = wide, one
    together = [result["sem_seg"] for result in model(batch)]
    assert [len(result) for result in together] == [4, 6, 1]
    for x, result in zip(batch, together, strict=True):
        torch.testing.assert_close(model([x])[0]["sem_seg"], result, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_similarity_scores_are_probabilities_of_the_head_and_the_texts(open_model):
    images = open_model.preprocess(inputs((48, 64)))
    proposals = open_model.eval().predict(images, COLOURS)
    probs = proposals.class_probs
    torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:2]))
    torch.testing.assert_close(probs[..., -1], proposals.class_logits.softmax(-1)[..., -1])


def test_a_training_between_two_vocabularies_leaves_no_stale_texts(open_model):
    other = Vocabulary(names=("green ring", "sky"), is_thing=(True, False))
    x = inputs((48, 48))[0]
    with torch.no_grad():
        open_model.eval()([x]), open_model([x | {"vocabulary": other}])
    optimizer = torch.optim.SGD(open_model.context_prompts.parameters(), lr=1.0)
    open_model.train()
    sum(open_model([x]).values()).backward()
    with torch.no_grad():
        before = open_model.eval().text_embeds(other)
        assert open_model.text_embeds(other).data_ptr() == before.data_ptr()
        open_model.train()
        optimizer.step()
        after = open_model.eval().text_embeds(other)
    assert not after.requires_grad and (after - before).abs().max() > 1e-5
    assert open_model.train().text_embeds(other).requires_grad


def test_fixed_texts_stay_out_of_the_graph_and_in_the_cache():
    model = random_mta(mta_cfg(LEARN_CONTEXTS=False)).train()
    first = model.text_embeds(COLOURS)
    assert first.shape == (1, 4, 128) and not first.requires_grad
    calls = []
    model.clip.text.register_forward_hook(lambda *_: calls.append(1))
    model([inputs((48, 48))[0]])
    assert not calls


@torch.no_grad()
def test_a_class_is_one_text_whatever_its_synonyms(open_model):
    assert len(COLOURS.synonyms[0]) == 2
    alone = replace(COLOURS, synonyms=())
    torch.testing.assert_close(open_model.eval().text_embeds(COLOURS), open_model.text_embeds(alone))


def test_one_class():
    one = Vocabulary(names=("grass",), is_thing=(False,))
    model = random_mta(mta_cfg(num_classes=1, NEGATIVES="separate")).train()
    losses = model(inputs((48, 32), vocabulary=one))
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        assert model.eval()(inputs((48, 32), vocabulary=one))[0]["sem_seg"].shape == (1, 48, 32)


def test_contexts_are_not_decayed_and_texts_have_no_rate(model):
    groups = parameter_groups(
        model, base_lr=1.0, lr_factors={}, weight_decay=0.5, weight_decay_norm=0.0, weight_decay_embed=0.0
    )
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(model.context_prompts.contexts)] == 0.0
    assert decay[id(model.text_queries.mlp.layers[0].weight)] == 0.5
    assert not any(id(p) in decay for p in model.clip.parameters())


def test_a_checkpoint_brings_everything_back(model, tmp_path):
    Checkpointer(model, str(tmp_path)).save("model")
    fresh = random_mta(seed=1)
    Checkpointer(fresh, str(tmp_path)).load(str(tmp_path / "model.pth"))
    batch = inputs((40, 56))
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(batch)[0]["sem_seg"], model.eval()(batch)[0]["sem_seg"])


def test_bad_inputs(model, open_model):
    batch = inputs((32, 32))
    with pytest.raises(ValueError, match="vocabulary has 7 classes.*fixed to the 4"):
        model.eval()([batch[0] | {"vocabulary": numbered_vocabulary(7, 7)}])
    long = Vocabulary(names=("red star", "a very long name of a thing"), is_thing=(True, True))
    with pytest.raises(
        ValueError, match=r"class 'a very long name of a thing' has \d+ tokens .*TEXT_LENGTH 8 leaves 5"
    ):
        open_model.eval()([batch[0] | {"vocabulary": long}])
    # Sentences of fixed texts are refused, too, where other methods cut them.
    long = Vocabulary(names=("grass " * 80,), is_thing=(True,))
    with pytest.raises(ValueError, match=r"class 'a photo of a grass .* has \d+ tokens .*OVShapes-RN has 77 places"):
        random_mta(mta_cfg(LEARN_CONTEXTS=False)).text_embeds(long)
    del batch[0]["vocabulary"]
    with pytest.raises(ValueError, match="no class names"):
        model.train()(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"SCORE": "cosine"}, "MTA_CLIP.SCORE is 'cosine'; allowed are head, similarity"),
        ({"SCORE": "similarity", "LOSS_WEIGHT": 0.0}, "SCORE is 'similarity'.*LOSS_WEIGHT above 0"),
        ({"SCORE": "similarity", "TEXT_ENHANCED": False}, "SCORE is 'similarity'.*TEXT_ENHANCED True"),
        ({"SEPARATE_ATTENTION": True, "LOSS_WEIGHT": 0.0}, "SEPARATE_ATTENTION is True and LOSS_WEIGHT 0"),
        ({"NUM_CONTEXTS": 0}, "NUM_CONTEXTS is 0; expected at least 1"),
        ({"TEXT_LENGTH": 5}, "TEXT_LENGTH is 5; expected at least CONTEXT_LENGTH \\+ 3, 6"),
        ({"TEXT_LENGTH": 78}, "TEXT_LENGTH is 78; .*at most the 77 places of OVShapes-RN"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(mta_cfg(**options))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [("CLASS_HEAD", "embed", "linear"), ("NAME", "FCCLIPProposals", "Mask2FormerProposals")],
)
def test_text_queries_go_with_mask2formers_decoder_and_head(key, value, expected):
    cfg = mta_cfg()
    cfg.MODEL.OVSEG.PROPOSALS[key] = value
    with pytest.raises(ValueError, match=f"PROPOSALS.{key} is '{value}', but .*; expected '{expected}'"):
        build_model(cfg)
