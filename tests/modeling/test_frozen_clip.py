"""Hosts of a frozen CLIP: training, evaluation, any vocabulary at any time, odd masks and bad configurations."""

import pytest
import torch
from detectron2.modeling import build_model

from ovseg_d2.structures import Vocabulary
from tests.modeling.tiny_fcclip import COLOURS, inputs
from tests.modeling.tiny_hosts import ONE, OTHERS, host_cfg, host_inputs, random_host, sem_seg

HOSTS = ["MaskFormerProposals", "FreeSegProposals"]


@pytest.fixture(scope="module", params=HOSTS)
def model(request):
    return random_host(host_cfg(request.param))


@pytest.fixture(scope="module")
def of_files():
    return random_host(host_cfg("PrecomputedProposals"))


@pytest.mark.parametrize("num_masks", [3, 0], ids=["targets", "no targets"])
def test_training_reaches_every_parameter_but_clip(model, num_masks):
    model.train().zero_grad()
    losses = model(inputs((33, 70), (64, 41), num_masks=num_masks))
    assert all(loss.isfinite() and loss.dim() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert {name.split(".")[0] for name in trained} == {"proposals"}
    assert not any(module.training for module in model.clip.modules())


def test_one_image_without_targets(model):
    batch = inputs((33, 70), (64, 41))
    batch[1]["instances"] = batch[1]["instances"][:0]
    losses = model.train()(batch)
    assert all(loss.isfinite() for loss in losses.values())


def test_a_step_changes_the_generator_alone():
    torch.manual_seed(0)
    model = build_model(host_cfg()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    batch, totals = inputs((64, 64), (64, 48)), []
    for _ in range(25):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert sum(totals[-5:]) < 0.8 * sum(totals[:5])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and {name.split(".")[0] for name in changed} == {"proposals"}


@torch.no_grad()
@pytest.mark.parametrize("vocabulary", [COLOURS, OTHERS, ONE], ids=["four", "three", "one"])
def test_results_follow_the_vocabulary(model, vocabulary):
    batch = inputs((33, 70), (64, 41), vocabulary=vocabulary)
    batch[0] |= {"height": 50, "width": 99}
    for x, result in zip(batch, model.eval()(batch), strict=True):
        assert result["sem_seg"].shape == (len(vocabulary), x["height"], x["width"])
        assert result["sem_seg"].isfinite().all()
        assert result["panoptic_seg"][0].shape == (x["height"], x["width"])


@pytest.mark.parametrize("vocabulary", [OTHERS, ONE])
def test_training_follows_the_vocabulary(model, vocabulary):
    losses = model.train()(inputs((40, 40), vocabulary=vocabulary))
    assert all(loss.isfinite() for loss in losses.values())


def test_batch_equals_single(model):
    batch = inputs((64, 40), (64, 40))
    for x, together in zip(batch, sem_seg(model, batch), strict=True):
        torch.testing.assert_close(together, sem_seg(model, [x])[0], rtol=1e-3, atol=1e-4)


def test_permuted_classes_permute_the_results(model):
    order = [2, 0, 3, 1]
    columns = (COLOURS.names, COLOURS.is_thing, COLOURS.synonyms)
    permuted = Vocabulary(*(tuple(column[i] for i in order) for column in columns))
    before = sem_seg(model, inputs((48, 64)))[0]
    after = sem_seg(model, inputs((48, 64), vocabulary=permuted))[0]
    torch.testing.assert_close(after, before[order], rtol=1e-3, atol=1e-4)
    assert float((before - before.mean(0)).abs().max()) > 1e-3  # the classes are told apart


@pytest.mark.parametrize("generator", HOSTS)
def test_two_vocabularies_in_one_process(generator):
    """Train with A, evaluate A, then B: as a new model that only ever saw B."""
    model, fresh = (random_host(host_cfg(generator)) for _ in range(2))
    sum(model.train()(inputs((40, 40))).values()).backward()
    batch_a, batch_b = inputs((48, 48)), inputs((48, 48), vocabulary=OTHERS)
    first = sem_seg(model, batch_a)[0]
    expected = sem_seg(fresh, batch_b)[0]
    torch.testing.assert_close(sem_seg(model, batch_b)[0], expected)
    mixed = sem_seg(model, [batch_a[0], batch_b[0]])
    torch.testing.assert_close(mixed[0], first, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mixed[1], expected, rtol=1e-4, atol=1e-6)


def masks_of(*, empty, size=(48, 64)):
    """Masks (Q, H, W): so many rectangles, and empty ones at the places ``empty``."""
    masks = torch.zeros(4, *size, dtype=torch.bool)
    for i, mask in enumerate(masks):
        mask[8 * i : 8 * i + 20, 10 * i : 10 * i + 25] = i not in empty
    return masks


def of_masks(*masks):
    batch = inputs(*(m.shape[1:] for m in masks))
    for x, m in zip(batch, masks, strict=True):
        x["proposals"] = m
    return batch


def test_empty_masks_say_nothing(of_files):
    some, batch = masks_of(empty=(1, 2)), of_masks(masks_of(empty=(1, 2)))
    without = of_masks(some[some.flatten(1).any(1)])
    torch.testing.assert_close(sem_seg(of_files, batch)[0], sem_seg(of_files, without)[0], rtol=1e-4, atol=1e-5)


def test_only_empty_masks_and_none(of_files):
    of_files.proposals.residual_mask = False
    batch = of_masks(masks_of(empty=range(4)), masks_of(empty=())[:0], masks_of(empty=(0,)))
    first, second, third = sem_seg(of_files, batch)
    of_files.proposals.residual_mask = True
    assert not first.any() and not second.any() and third.std() > 0
    # Beside images without a mask an image has the results that it has alone.
    of_files.proposals.residual_mask = False
    torch.testing.assert_close(third, sem_seg(of_files, batch[2:])[0], rtol=1e-4, atol=1e-5)
    of_files.proposals.residual_mask = True


def test_numbers_of_masks_differ_within_a_batch(of_files):
    batch = of_masks(masks_of(empty=())[:1], masks_of(empty=()))
    for x, together in zip(batch, sem_seg(of_files, batch), strict=True):
        torch.testing.assert_close(together, sem_seg(of_files, [x])[0], rtol=1e-4, atol=1e-5)


def test_clip_decides_as_much_as_the_ensemble_lets_it():
    model = random_host()
    batch = inputs((48, 64))
    results = {}
    for name, weight in (("none", 0.7), ("zsseg", 0.7), ("ovseg", 0.7), ("ovseg", 0.0), ("ovseg", 1.0)):
        model.ensemble.name, model.ensemble.weight = name, weight
        results[name, weight] = sem_seg(model, batch)[0]
    assert float((results["zsseg", 0.7] - results["ovseg", 0.7]).abs().max()) > 1e-4
    # Alone it decides with lambda 1, as without an ensemble; by the public rule with lambda 0, too.
    torch.testing.assert_close(results["ovseg", 1.0], results["none", 0.7])
    torch.testing.assert_close(results["ovseg", 0.0], results["none", 0.7])
    # Without CLIP's part the generator's classes would be there.
    model.ensemble.name, model.ensemble.weight = "ovseg", 1e-6
    images = model.preprocess(batch)
    with torch.no_grad():
        proposals = model.proposals(images, text=model.query_text(COLOURS))
        probs = model.predict(images, COLOURS).class_probs[..., :-1]
    torch.testing.assert_close(probs, proposals.class_logits.softmax(-1)[..., :-1], rtol=1e-3, atol=1e-4)


def test_lambda_of_datasets():
    cfg = host_cfg()
    cfg.MODEL.OVSEG.ENSEMBLE.NAME = "ovseg"
    cfg.MODEL.OVSEG.ENSEMBLE.LAMBDA_OF = [["far_away", 0.1]]
    model = random_host(cfg)
    near, far = inputs((48, 64), dataset_name="near_by"), inputs((48, 64), dataset_name="far_away")
    both = sem_seg(model, near + far)
    model.ensemble.weight_of = {}
    expected_near = sem_seg(model, near)[0]
    model.ensemble.weight = 0.1
    expected_far = sem_seg(model, far)[0]
    torch.testing.assert_close(both, [expected_near, expected_far], rtol=1e-4, atol=1e-5)
    assert float((expected_near - expected_far).abs().max()) > 1e-4


def test_calibration_lowers_seen_classes():
    model = random_host()
    model.text_classifier.trained_vocabulary = OTHERS  # shares "brick", the last class
    batch = inputs((48, 64))
    before = model.eval()(batch)[0]
    model.calibration = 0.25
    after = model(batch)[0]
    torch.testing.assert_close(after["sem_seg"][:3], before["sem_seg"][:3])
    torch.testing.assert_close(after["sem_seg"][3], before["sem_seg"][3] - 0.25)
    assert torch.equal(after["panoptic_seg"][0], before["panoptic_seg"][0])
    model.inference.tasks = {"panoptic"}
    assert set(model(batch)[0]) == {"panoptic_seg"}


def test_regions_can_have_texts_of_their_own():
    cfg = host_cfg()
    cfg.MODEL.OVSEG.FROZEN_CLIP.REGION_TEMPLATES = ["this is {}", "only a {}"]
    model = random_host(cfg)
    query, region = model.query_text(COLOURS), model.region_text(COLOURS)
    assert query.embeds.shape == region.embeds.shape and float((query.embeds - region.embeds).abs().max()) > 1e-3
    cfg.MODEL.OVSEG.TEXT.TEMPLATES = cfg.MODEL.OVSEG.FROZEN_CLIP.REGION_TEMPLATES
    torch.testing.assert_close(random_host(cfg).query_text(COLOURS).embeds, region.embeds)


@pytest.mark.parametrize("generator", ["MaskFormerProposals", "PrecomputedProposals"])
def test_without_a_class_head_clip_names_and_nothing_trains(generator):
    cfg = host_cfg(generator)
    cfg.MODEL.OVSEG.PROPOSALS.CLASS_HEAD, cfg.MODEL.OVSEG.ENSEMBLE.NAME = "none", "none"
    model = random_host(cfg)
    assert sem_seg(model, host_inputs((48, 64)))[0].std() > 0
    with pytest.raises(ValueError, match=f"FrozenCLIP on {generator} has nothing to train; evaluate it with --eval"):
        model.train()(host_inputs((48, 64)))


def test_a_generator_on_a_clip_of_its_own():
    model = random_host(host_cfg("FCCLIPProposals")).train()
    batch = inputs((33, 70), (64, 41))
    losses = model(batch)
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = [p for clip in (model.clip, model.proposals.clip) for p in clip.parameters()]
    assert not any(p.requires_grad for p in frozen)
    assert not any(module.training for module in model.proposals.clip.modules())
    assert [scores.shape for scores in sem_seg(model, batch)] == [(4, 33, 70), (4, 64, 41)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"CLIP.TRAINABLE": "attention"}, "CLIP.TRAINABLE: got 'attention'; the CLIP of FrozenCLIP is 'frozen'"),
        ({"PROPOSALS.CLASS_HEAD": "linear"}, "CLASS_HEAD: got 'linear', which knows no unseen classes"),
        ({"PROPOSALS.CLASS_HEAD": "none"}, "ENSEMBLE.NAME is 'zsseg', but the mask generator has no classes"),
        ({"ENSEMBLE.NAME": "mean"}, "ENSEMBLE.NAME is 'mean'; allowed are none, zsseg"),
        ({"ENSEMBLE.LAMBDA": 1.5}, "ENSEMBLE.LAMBDA is 1.5; expected a number from 0 to 1"),
        ({"ENSEMBLE.LAMBDA_OF": [["there", -0.5]]}, "LAMBDA_OF there is -0.5; expected a number from 0 to 1"),
        ({"ENSEMBLE.LAMBDA_OF": ["there", 0.5]}, r"LAMBDA_OF is \['there', 0.5\]; expected \[\[dataset, number\]"),
        ({"ENSEMBLE.LAMBDA_OF": [["there", "half"]]}, r"LAMBDA_OF is .*'half'.*expected \[\[dataset, number\]"),
        ({"CROPS.STYLE": "box"}, "CROPS.STYLE is 'box'; allowed are mask_crop"),
        ({"CROPS.EXPAND": 0.5}, "CROPS.EXPAND is 0.5; expected at least 1"),
        ({"FROZEN_CLIP.REGION_TEMPLATES": ["vlid"]}, "FROZEN_CLIP.REGION_TEMPLATES: 'vlid' is neither a set"),
    ],
)
def test_bad_configurations(changes, message):
    cfg = host_cfg()
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        cfg.MODEL.OVSEG[section][name] = value
    with pytest.raises(ValueError, match=message) as error:
        build_model(cfg)
    assert "\n" not in str(error.value)
