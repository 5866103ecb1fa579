"""FGA-seg and CAT-Seg as whole models."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ovseg_d2.engine.optimizer import build_optimizer
from ovseg_d2.modeling.meta_arch.fga_seg import FGASeg
from ovseg_d2.structures import Vocabulary
from tests.helpers import numbered_vocabulary
from tests.modeling.tiny_fga_seg import NUM_CLASSES, fga_cfg, inputs, make

VARIANTS = [
    ("CATSeg", {}),
    ("FGASeg", {}),
    ("FGASeg", {"FAST": True, "FUSION": "add", "TOP_K": 2}),
    ("FGASeg", {"P2T_LAYERS": 0, "ALIGN_LOSS": "mse", "CLASS_LOSS": "ce", "MAX_CLASSES": 0}),
    ("FGASeg", {"LOCAL_SIMILARITY": False, "ALIGN_WEIGHT": 0.0, "LEARN_RESIDUAL_SCALE": False}),
    ("FGASeg", {"NORMALISE_KERNELS": False, "KERNEL_SIZE": 5, "CLASS_ATTENTION": "full", "MAX_CLASSES": 3}),
]
IDS = ["catseg", "default", "fast-add", "no-p2t-ce", "p2t-alone", "kernels-full-truncated"]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("empty", [False, True])
def test_a_gradient_for_every_trained_parameter(name, options, empty):
    model = make(fga_cfg(name, **options)).train()
    batch = inputs(num_masks=0 if empty else 3)
    losses = model(batch)
    expected = {"loss_sem_seg"}
    if name == "FGASeg" and options.get("ALIGN_WEIGHT", 1):
        expected.add("loss_align")
    if options.get("FAST"):
        expected |= {"loss_aux_0", "loss_aux_1", "loss_aux_2"}
    assert set(losses) == expected
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("clip.")}
    assert {n.rpartition(".")[2] for n in trained} == {"q_proj_weight", "v_proj_weight"}
    # 8 blocks of the image tower, whose last queries do nothing, and 3 of the text tower
    assert len(trained) == 2 * (8 + 3) - 1


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
@torch.no_grad()
def test_results_and_batches(name, options):
    model = make(fga_cfg(name, **options))
    batch = inputs((64, 96), (64, 90))
    batch[1]["height"], batch[1]["width"] = 33, 50
    results, alone = model(batch), model(batch[1:])
    for x, result in zip(batch, results, strict=True):
        sem_seg = result["sem_seg"]
        assert set(result) == {"sem_seg"} and sem_seg.shape == (NUM_CLASSES, x["height"], x["width"])
        assert 0 <= sem_seg.min() and sem_seg.max() <= 1
        assert sem_seg.std(dim=(1, 2)).max() > 1e-4
        if options.get("CLASS_LOSS") == "ce":
            torch.testing.assert_close(sem_seg.sum(0), torch.ones(x["height"], x["width"]))
    # A single image of the second's size is padded alike.
    torch.testing.assert_close(results[1]["sem_seg"], alone[0]["sem_seg"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
@torch.no_grad()
def test_the_order_of_classes_does_not_matter(name, options):
    model = make(fga_cfg(name, **options))
    (x,) = inputs((64, 64))
    order = [3, 0, 4, 2, 1]
    names = x["vocabulary"].names
    other = Vocabulary(names=tuple(names[i] for i in order), is_thing=(True,) * NUM_CLASSES)
    first, second = model([x])[0]["sem_seg"], model([{**x, "vocabulary": other}])[0]["sem_seg"]
    torch.testing.assert_close(second, first[order], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("num_classes", [1, 2, 11])
@pytest.mark.parametrize("name", ["CATSeg", "FGASeg"])
def test_vocabularies_of_any_size(name, num_classes, caplog):
    model = make(fga_cfg(name))
    batch = inputs()
    for x in batch:
        x["vocabulary"] = numbered_vocabulary(num_classes, 1)
        x["instances"].gt_classes %= num_classes
    with torch.no_grad(), caplog.at_level(logging.INFO):
        sem_seg = model(batch)[0]["sem_seg"]
    assert len(sem_seg) == num_classes and torch.isfinite(sem_seg).all()
    # Of 11 classes, 8 are aggregated, the other three get no pixel.
    assert int((sem_seg.flatten(1).amax(1) < 1e-6).sum()) == max(num_classes - 8, 0)
    losses = model.train()(batch)
    assert all(torch.isfinite(loss) for loss in losses.values())


@torch.no_grad()
def test_two_vocabularies_and_a_step_of_training_in_one_process():
    model = make(fga_cfg())
    x = inputs((64, 64))[0]
    other = {**x, "vocabulary": numbered_vocabulary(3, 1)}
    together = model([x, other])
    assert [len(result["sem_seg"]) for result in together] == [NUM_CLASSES, 3]
    torch.testing.assert_close(together[1]["sem_seg"], model([other])[0]["sem_seg"])
    optimizer = torch.optim.SGD([p for p in model.clip.text.parameters() if p.requires_grad], lr=100.0)
    with torch.enable_grad():
        sum(model.train()([x]).values()).backward()
    optimizer.step()
    model.eval()
    assert not torch.allclose(model([x])[0]["sem_seg"], together[0]["sem_seg"], atol=1e-5)


def test_the_text_tower_runs_once_a_step_and_once_an_evaluation(monkeypatch):
    model, calls = make(fga_cfg()), []
    forward = model.clip.text.forward
    monkeypatch.setattr(model.clip.text, "forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw))
    model.train()(inputs())
    assert len(calls) == 1
    model.eval()
    for _ in range(2):
        with torch.no_grad():
            model(inputs())
    assert len(calls) == 2


def test_a_class_with_several_names_is_its_first():
    model = make(fga_cfg())
    vocabulary = Vocabulary(
        names=("door, gate", "sky"), is_thing=(True, False), synonyms=(("door, gate",), ("sky", "heaven"))
    )
    plain = Vocabulary(names=("door", "sky"), is_thing=(True, False))
    assert torch.equal(model.text(vocabulary).embeds, model.text(plain).embeds)


@torch.no_grad()
def test_pooling_of_training_and_of_evaluation():
    model = make(fga_cfg())
    pools = lambda: {layer.classes.pooling for layer in model.cost_head.aggregation.layers}  # noqa: E731
    assert pools() == {1}
    assert model.train() is model and pools() == {2}


# ---- windows


@pytest.mark.parametrize("class_loss", ["bce", "ce"])
@torch.no_grad()
def test_windows_of_a_warped_image_beside_the_whole(class_loss):
    cfg = fga_cfg(CLASS_LOSS=class_loss)
    sliding = cfg.MODEL.OVSEG.TEST.SLIDING
    sliding.SIZE, sliding.STRIDE, sliding.BATCH = 48, 32, 3
    sliding.IMAGE_SIZE, sliding.WHOLE_IMAGE = 80, True
    model = make(cfg)
    batch = inputs((64, 96), (50, 41))
    results = model(batch)
    for x, result in zip(batch, results, strict=True):
        image = model.preprocess([x]).tensor[:, :, : x["height"], : x["width"]]
        resize = lambda y, size: F.interpolate(y, size=size, mode="bilinear")  # noqa: E731

        def score(window, vocabulary=x["vocabulary"]):
            return model.scores(resize(model.pixel_logits(window, vocabulary), (48, 48)))  # noqa: B023

        warped = resize(image, (80, 80))
        total, count = torch.zeros(1, NUM_CLASSES, 80, 80), torch.zeros(80, 80)
        for top in (0, 32):
            for left in (0, 32):
                place = (..., slice(top, top + 48), slice(left, left + 48))
                total[place] += score(warped[place])
                count[place] += 1
        expected = (total / count + resize(score(resize(image, (48, 48))), (80, 80))) / 2
        expected = resize(expected, (x["height"], x["width"]))[0]
        torch.testing.assert_close(result["sem_seg"], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_window_larger_than_the_image():
    cfg = fga_cfg()
    cfg.MODEL.OVSEG.SIZE_DIVISIBILITY = 0
    plain = make(cfg)
    cfg.MODEL.OVSEG.TEST.SLIDING.SIZE, cfg.MODEL.OVSEG.TEST.SLIDING.STRIDE = 200, 100
    windows = make(cfg)
    batch = inputs((50, 41))
    logits = plain.batch_logits(plain.preprocess(batch), batch[0]["vocabulary"])
    expected = F.interpolate(logits, size=(50, 41), mode="bilinear").sigmoid()[0]
    torch.testing.assert_close(windows(batch)[0]["sem_seg"], expected, atol=1e-5, rtol=1e-4)
    sizes = [result["sem_seg"].shape[1:] for result in windows(inputs())]
    assert sizes == [(64, 96), (50, 41)]


@pytest.mark.parametrize(("resize", "size"), [("none", 0), ("short", 40), ("square", 40)])
@torch.no_grad()
def test_other_copies_for_clip(resize, size):
    cfg = fga_cfg()
    cfg.MODEL.OVSEG.CLIP.RESIZE, cfg.MODEL.OVSEG.CLIP.INPUT_SIZE = resize, size
    cfg.MODEL.OVSEG.TEXT.TRAINABLE = "frozen"
    model = make(cfg)
    batch = inputs()
    assert [result["sem_seg"].shape[1:] for result in model(batch)] == [(64, 96), (50, 41)]
    assert all(torch.isfinite(loss) for loss in model.train()(batch).values())


# ---- what trains


def test_prompts_train_beside_frozen_towers():
    """Table VII, Prompt-16."""
    cfg = fga_cfg(PROMPT_LENGTH=3)
    cfg.MODEL.OVSEG.CLIP.TRAINABLE = cfg.MODEL.OVSEG.TEXT.TRAINABLE = "frozen"
    model = make(cfg).train()
    assert not any(p.requires_grad for part in (model.clip.visual.tower, model.clip.text) for p in part.parameters())
    assert model.clip.visual.prompts.embeddings.shape == (7, 3, 128)
    sum(model(inputs()).values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(model.clip.visual.prompts.embeddings.grad.flatten(1).any(1))
    assert all(model.text_prompts.prompts.grad.flatten(1).any(1))


@pytest.mark.parametrize("policy", ["full", "frozen"])
def test_other_policies(policy):
    """Table VII."""
    cfg = fga_cfg()
    cfg.MODEL.OVSEG.CLIP.TRAINABLE = cfg.MODEL.OVSEG.TEXT.TRAINABLE = policy
    model = make(cfg).train()
    sum(model(inputs()).values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    towers = [p for part in (model.clip.visual.tower, model.clip.text) for p in part.parameters()]
    assert {p.requires_grad for p in towers} == {policy == "full"}


def test_clip_learns_slowly():
    cfg = fga_cfg()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.LR_FACTORS = 0.0002, [["clip", 0.01]]
    model = make(cfg)
    rates = {p: group["lr"] for group in build_optimizer(cfg, model).param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[parameter] == pytest.approx(2e-6 if name.startswith("clip.") else 2e-4)


# ---- objects


@pytest.mark.parametrize("tasks", [("semantic", "panoptic", "instance"), ("panoptic",)])
@torch.no_grad()
def test_masks_of_a_generator_get_classes(tasks):
    cfg = fga_cfg(tasks=tasks)
    cfg.MODEL.OVSEG.TEST.MASK_VOTING = True
    model = make(cfg)
    assert not any(p.requires_grad for p in model.proposals.parameters())
    batch = inputs()
    results = model(batch)
    names = {"semantic": "sem_seg", "panoptic": "panoptic_seg", "instance": "instances"}
    for x, result in zip(batch, results, strict=True):
        assert set(result) == {names[task] for task in tasks}
        assert result["panoptic_seg"][0].shape == (x["height"], x["width"])
    losses = model.train()(batch)
    assert set(losses) == {"loss_sem_seg", "loss_align"}


@torch.no_grad()
def test_the_votes_are_those_of_the_pixels():
    cfg = fga_cfg(tasks=("semantic", "panoptic"))
    cfg.MODEL.OVSEG.TEST.MASK_VOTING, cfg.MODEL.OVSEG.PROPOSALS.NAME = True, "PrecomputedProposals"
    cfg.MODEL.OVSEG.PROPOSALS.CLASS_HEAD, cfg.MODEL.OVSEG.PROPOSALS.RESIDUAL_MASK = "none", False
    model = make(cfg)
    (x,) = inputs((64, 96))
    x["proposals"] = torch.zeros(2, 64, 96, dtype=torch.bool)
    x["proposals"][0, :, :40] = True
    x["proposals"][1, :, 40:] = True
    x["vocabulary"] = replace(x["vocabulary"], is_thing=(True,) * NUM_CLASSES)
    result = model([x])[0]
    ids, segments = result["panoptic_seg"]
    for segment in segments:
        inside = ids == segment["id"]
        assert segment["category_id"] == int(result["sem_seg"][:, inside].mean(1).argmax())
    assert len(segments) == 2


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"CLASS_LOSS": "dice"}, "FGA_SEG.CLASS_LOSS is 'dice'; allowed are bce, ce"),
        ({"ALIGN_LOSS": "l1"}, "FGA_SEG.ALIGN_LOSS is 'l1'; allowed are bce, mse"),
        ({"AUX_WEIGHTS": [1.0]}, "FGA_SEG.AUX_WEIGHTS is .*; expected one for each of 3"),
        ({"GUIDANCE_LAYERS": [3]}, "FGA_SEG.GUIDANCE_LAYERS is .3.; expected two blocks"),
        ({"GUIDANCE_LAYERS": [3, 8]}, "block8"),
        ({"KERNEL_SIZE": 4}, "4"),
        ({"DECODER_GUIDANCE_DIMS": [8]}, "with guidance of .8. and .* expected two of each"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(fga_cfg(**options))


def test_a_clip_that_is_no_vit():
    cfg = fga_cfg()
    cfg.MODEL.OVSEG.CLIP.NAME = "OVShapes-RN"
    with pytest.raises(ValueError, match="OVShapes-RN is of the kind 'resnet'; CATSeg and FGASeg take a ViT"):
        make(cfg)


def test_objects_without_masks():
    with pytest.raises(ValueError, match="FGASeg classifies pixels and knows no objects.*MASK_VOTING"):
        make(fga_cfg(tasks=("panoptic",)))


def test_cat_seg_is_fga_seg_without_additions():
    off = {"P2T_LAYERS": 0, "ALIGN_WEIGHT": 0.0, "LOCAL_SIMILARITY": False, "FAST": False}
    first, second = make(fga_cfg("CATSeg")), make(fga_cfg("FGASeg", **off))
    assert isinstance(first, FGASeg) and isinstance(second, nn.Module)
    first.load_state_dict(second.state_dict())
    batch = inputs()
    with torch.no_grad():
        torch.testing.assert_close(first(batch)[0]["sem_seg"], second(batch)[0]["sem_seg"])
