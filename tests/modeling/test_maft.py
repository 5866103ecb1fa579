"""MAFT: what it trains and what stays, on every host's masks, with odd targets, masks and configurations."""

import logging

import pytest
import torch
from detectron2.modeling import build_model

from ovseg_d2.modeling.losses.mask_aware import distill_loss, normalized_iou, soft_iou
from ovseg_d2.modeling.meta_arch import maft
from ovseg_d2.structures import Vocabulary
from tests.modeling.tiny_fcclip import COLOURS
from tests.modeling.tiny_hosts import (
    GENERATORS,
    ONE,
    OTHERS,
    host_inputs,
    maft_cfg,
    random_host,
    sem_seg,
    with_masks,
)

CLIPS = ["OVShapes-ViT", "OVShapes-RN"]
SIZES = [(33, 70), (64, 41)]


@pytest.fixture(scope="module", params=CLIPS)
def model(request):
    return random_host(maft_cfg(clip=request.param))


def total(losses):
    assert all(loss.isfinite() and loss.dim() == 0 for loss in losses.values())
    return sum(losses.values())


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("generator", GENERATORS)
def test_training_reaches_every_parameter_of_ip_clip(generator, clip):
    model = random_host(maft_cfg(generator, clip)).train()
    losses = model(host_inputs(*SIZES))
    assert set(losses) == {"loss_mask_aware", "loss_distill"}
    total(losses).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"ip_clip"}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert not any(m.training for part in (model.clip, model.proposals) for m in part.modules() if list(m.parameters()))
    for scores, size in zip(sem_seg(model, host_inputs(*SIZES)), SIZES, strict=True):
        assert scores.shape == (4, *size) and scores.std() > 0


@pytest.mark.parametrize("distill_weight", [0.1, 0.0])
def test_empty_targets(model, distill_weight):
    model.train().zero_grad()
    weight, model.distill_weight = model.distill_weight, distill_weight
    losses = model(host_inputs(*SIZES, num_masks=0))
    model.distill_weight = weight
    total(losses).backward()
    assert losses["loss_mask_aware"].item() == 0 and ("loss_distill" in losses) == bool(distill_weight)
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_an_image_without_targets_is_left_out_and_counted(model):
    batch = host_inputs((48, 48), (48, 48))
    expected = model.train()(batch[:1])["loss_mask_aware"]
    before = model.num_images_without_targets
    batch[1]["instances"] = batch[1]["instances"][:0]
    torch.testing.assert_close(model(batch)["loss_mask_aware"], expected, rtol=1e-4, atol=1e-6)
    assert model.num_images_without_targets == before + 1


def test_the_count_is_logged(monkeypatch):
    model, lines = random_host(maft_cfg()).train(), []
    monkeypatch.setattr(maft, "log_every_n_seconds", lambda level, message, **kwargs: lines.append((level, message)))
    model(host_inputs((40, 40)))
    assert lines == []
    model.num_images_without_targets = 6
    model(host_inputs((40, 40), num_masks=0))
    (line,) = lines
    assert line[0] == logging.WARNING and "7 times an image without ground truth was left out" in line[1]


def test_the_losses_are_those_of_the_paper():
    """Equations 6 to 8 from the parts, on one image."""
    model = random_host(maft_cfg(DISTILL_WEIGHT=0.3)).train()
    batch = host_inputs((64, 64))
    losses = model(batch)
    with torch.no_grad():
        images = model.preprocess(batch)
        text = model.region_text(COLOURS)
        rows = text.embeds[:, 0]
        picture = torch.nn.functional.interpolate(images.tensor, size=(40, 40), mode="bilinear", align_corners=False)
        proposals = model.proposals(images)
        probs = proposals.mask_logits.sigmoid()[0]
        features = model.ip_clip(picture)

        def class_probs(embeds):
            logits = model.clip.scale() * torch.nn.functional.normalize(embeds, dim=-1) @ rows.T
            logits = torch.stack([logits[..., text.class_ids == k].amax(-1) for k in range(4)], dim=-1)
            return logits.softmax(-1), logits

        scores, _ = class_probs(model.ip_clip.encode_masks(features, probs[None])[0])
        instances = batch[0]["instances"]
        target = normalized_iou(soft_iou(probs, instances.gt_masks.tensor))
        expected = torch.nn.functional.smooth_l1_loss(scores[:, instances.gt_classes].T, target)
        student, teacher = (
            class_probs(embeds)[1] for embeds in (features.image_embeds, model.clip.visual(picture).image_embeds)
        )
    torch.testing.assert_close(losses["loss_mask_aware"], expected, rtol=1e-4, atol=1e-6, check_device=False)
    torch.testing.assert_close(losses["loss_distill"], 0.3 * distill_loss(student, teacher), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", ["smooth_l1", "l1", "l2", "kl"])
def test_training_steps_change_ip_clip_alone(kind):
    torch.manual_seed(0)
    model = random_host(
        maft_cfg("FCCLIPProposals" if kind == "smooth_l1" else "PrecomputedProposals", LOSS=kind)
    ).train()
    model.fill_missing(set())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    batch, losses = host_inputs((48, 48), (48, 40)), []
    for _ in range(10):
        found = model(batch)
        optimizer.zero_grad()
        total(found).backward()
        optimizer.step()
        losses.append(found)
    assert losses[0]["loss_distill"].item() < 1e-12 < losses[-1]["loss_distill"].item()
    # The divergence of two flat distributions has little slope.
    ratio = losses[-1]["loss_mask_aware"] / losses[0]["loss_mask_aware"]
    assert ratio < (0.999 if kind == "kl" else 0.95)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"ip_clip"}
    tower = {name.removeprefix("ip_clip.tower.") for name in changed}
    assert not {"conv1.weight", "class_embedding", "positional_embedding", "proj"} & tower
    assert not any(".mlp." in name for name in tower) and {"ln_post.weight", "ln_post.bias"} <= tower


def test_masks_without_pixels_and_rows_that_fill_the_batch(model):
    """They change neither the losses nor the results."""
    batch = host_inputs((48, 64), (48, 64))
    losses, scores = model.train()(batch), sem_seg(model, batch)
    for x in batch:
        x["proposals"] = torch.cat([torch.zeros(2, 48, 64, dtype=torch.bool), x["proposals"]])
    for name, loss in model.train()(batch).items():
        torch.testing.assert_close(loss, losses[name], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(sem_seg(model, batch), scores, rtol=1e-4, atol=1e-5)


def test_numbers_of_masks_differ_within_a_batch(model):
    batch = host_inputs((48, 64), (48, 64))
    batch[0]["proposals"] = batch[0]["proposals"][:1]
    alone = [model.train()([x])["loss_mask_aware"] for x in batch]
    # A mean over pairs of targets and masks, of which the images have different numbers.
    pairs = [3 * 2, 3 * 4]
    expected = sum(n * loss for n, loss in zip(pairs, alone, strict=True)) / sum(pairs)
    torch.testing.assert_close(model(batch)["loss_mask_aware"], expected, rtol=1e-4, atol=1e-6)
    for x, together in zip(batch, sem_seg(model, batch), strict=True):
        torch.testing.assert_close(together, sem_seg(model, [x])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masks", ["none", "empty"])
def test_an_image_without_any_proposal(model, masks):
    batch = host_inputs((48, 64), (48, 64))
    model.proposals.residual_mask = False
    expected = model.train()(batch[1:])["loss_mask_aware"]
    batch[0]["proposals"] = batch[0]["proposals"][:0] if masks == "none" else batch[0]["proposals"] & False
    losses = model(batch)
    torch.testing.assert_close(losses["loss_mask_aware"], expected, rtol=1e-4, atol=1e-6)
    lonely = model(batch[:1])
    total(lonely).backward()
    assert lonely["loss_mask_aware"].item() == 0
    first, second = sem_seg(model, batch)
    model.proposals.residual_mask = True
    assert not first.any() and second.std() > 0


@pytest.mark.parametrize("vocabulary", [OTHERS, ONE], ids=["three", "one"])
def test_vocabularies_of_training_and_evaluation(model, vocabulary):
    total(model.train()(host_inputs(*SIZES, vocabulary=vocabulary)))
    batch = host_inputs(*SIZES, vocabulary=vocabulary)
    batch[0] |= {"height": 50, "width": 99}
    for x, result in zip(batch, model.eval()(batch), strict=True):
        assert result["sem_seg"].shape == (len(vocabulary), x["height"], x["width"])
        assert result["panoptic_seg"][0].shape == (x["height"], x["width"])


def test_one_class_has_all_the_score(model):
    batch = host_inputs((40, 56), vocabulary=ONE)
    masks = torch.cat([batch[0]["proposals"], ~batch[0]["proposals"].any(0, keepdim=True)])
    torch.testing.assert_close(sem_seg(model, batch)[0][0], masks.sum(0).float(), rtol=1e-3, atol=1e-3)


def test_permuted_classes_permute_the_results(model):
    order = [2, 0, 3, 1]
    columns = (COLOURS.names, COLOURS.is_thing, COLOURS.synonyms)
    permuted = Vocabulary(*(tuple(column[i] for i in order) for column in columns))
    before = sem_seg(model, host_inputs((48, 64)))[0]
    after = sem_seg(model, host_inputs((48, 64), vocabulary=permuted))[0]
    torch.testing.assert_close(after, before[order], rtol=1e-4, atol=1e-5)
    assert float((before - before.mean(0)).abs().max()) > 1e-3


def test_batch_equals_single(model):
    batch = host_inputs((64, 40), (64, 40))
    for x, together in zip(batch, sem_seg(model, batch), strict=True):
        torch.testing.assert_close(together, sem_seg(model, [x])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("resize", ["none", "square", "short"])
def test_without_the_square_an_image_is_itself_in_any_batch(resize):
    """Sizes differ here: the padding is that of the batch, not of the image."""
    cfg = maft_cfg()
    cfg.MODEL.OVSEG.CLIP.RESIZE = resize
    model = random_host(cfg)
    batch = host_inputs((48, 48), (48, 48))
    for x, together in zip(batch, sem_seg(model, batch), strict=True):
        torch.testing.assert_close(together, sem_seg(model, [x])[0], rtol=1e-4, atol=1e-5)
    assert all(
        scores.shape == (4, *size) for scores, size in zip(sem_seg(model, host_inputs(*SIZES)), SIZES, strict=True)
    )


def test_two_vocabularies_in_one_process():
    """Train with A, evaluate A, then B: as a new model that only ever saw B."""
    model, fresh = random_host(maft_cfg()), random_host(maft_cfg())
    total(model.train()(host_inputs((40, 40)))).backward()
    batch_a, batch_b = host_inputs((48, 48)), host_inputs((48, 48), vocabulary=OTHERS)
    first, expected = sem_seg(model, batch_a)[0], sem_seg(fresh, batch_b)[0]
    torch.testing.assert_close(sem_seg(model, batch_b)[0], expected)
    mixed = sem_seg(model, [batch_a[0], batch_b[0]])
    torch.testing.assert_close(mixed[0], first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["zsseg", "maft"])
def test_ensembles_on_and_off(name):
    model = random_host(maft_cfg("MaskFormerProposals"))
    batch = host_inputs((48, 64))
    clip_alone = sem_seg(model, batch)[0]
    model.ensemble.name, model.ensemble.weight_of = name, {"far_away": 0.0}
    together = sem_seg(model, batch)[0]
    assert float((together - clip_alone).abs().max()) > 1e-3
    far = sem_seg(model, [batch[0] | {"dataset_name": "far_away"}])[0]
    torch.testing.assert_close(far, clip_alone, rtol=1e-4, atol=1e-6)


def test_calibration_lowers_seen_classes():
    model = random_host(maft_cfg())
    model.text_classifier.trained_vocabulary = OTHERS
    batch = host_inputs((48, 64))
    before, model.calibration = sem_seg(model, batch)[0], 0.5
    change = sem_seg(model, batch)[0] - before
    torch.testing.assert_close(change[:, 0, 0], torch.tensor([0.0, 0.0, 0.0, -0.5]))


def test_start_layers():
    """From the first block on, or in the last alone: all train, and they differ."""
    scores = []
    for start_layer in (0, 7):
        model = random_host(maft_cfg(START_LAYER=start_layer, DISTILL_WEIGHT=0.0)).train()
        total(model(host_inputs((40, 40)))).backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        scores.append(sem_seg(model, host_inputs((40, 40)))[0])
    assert float((scores[0] - scores[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("policy", ["full", "attention", "attention_qv", "projection", "all_but_cls_pos_mlp_conv"])
def test_a_copy_of_clip_by_every_policy(policy):
    cfg = maft_cfg()
    cfg.MODEL.OVSEG.CLIP.TRAINABLE = policy
    model = random_host(cfg)
    filled = model.fill_missing({"clip.logit_scale", "proposals.x"})
    assert filled == {name for name in model.state_dict() if name.startswith("ip_clip.")}
    for name, value in model.clip.visual.tower.state_dict().items():
        assert torch.equal(value, model.ip_clip.tower.state_dict()[name])
    assert not any(p.requires_grad for p in model.clip.parameters())
    losses = model.train()(host_inputs((40, 40)))
    assert losses["loss_distill"].item() < 1e-12
    total(losses).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_no_copy_where_a_file_gave_a_part():
    model = random_host(maft_cfg())
    before = {name: value.clone() for name, value in model.ip_clip.state_dict().items()}
    assert model.fill_missing({"ip_clip.tower.proj"}) == set()
    assert all(torch.equal(value, before[name]) for name, value in model.ip_clip.state_dict().items())


@torch.no_grad()
def test_autocast(model):
    batch = host_inputs((64, 48))
    expected = sem_seg(model, batch)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sem_seg(model, batch)[0]
        losses = model.train()(batch)
    assert got.isfinite().all() and float((got - expected).abs().mean()) < 0.1 * float(expected.abs().mean())
    total(losses)


def test_masks_that_did_not_come(model):
    batch = with_masks(host_inputs((40, 40)))
    del batch[0]["proposals"]
    for mode in (True, False):
        with pytest.raises(ValueError, match="no masks came with image"):
            model.train(mode)(batch)


@pytest.mark.parametrize(
    ("generator", "key", "value", "message"),
    [
        ("PrecomputedProposals", "CLIP.NAME", "convnext_tiny", "CLIP.NAME: convnext_tiny pools without attention"),
        ("PrecomputedProposals", "CLIP.TRAINABLE", "heads", "CLIP.TRAINABLE: 'heads' for a ClipViT; expected one of"),
        ("PrecomputedProposals", "CLIP.RESIZE", "squared", "CLIP.RESIZE: 'squared'; expected one of none, short"),
        ("PrecomputedProposals", "CLIP.INPUT_SIZE", 0, "CLIP.INPUT_SIZE: 0; expected pixels"),
        ("PrecomputedProposals", "MAFT.START_LAYER", 8, "start_layer is 8; expected -8 to 7"),
        ("PrecomputedProposals", "MAFT.LOSS", "huber", "MAFT.LOSS is 'huber'; allowed are smooth_l1, l1, l2, kl"),
        ("PrecomputedProposals", "ENSEMBLE.NAME", "zsseg", "NAME is 'zsseg', but the mask generator has no classes"),
        ("MaskFormerProposals", "PROPOSALS.CLASS_HEAD", "linear", "CLASS_HEAD: got 'linear', which knows no unseen"),
        ("MaskFormerProposals", "ENSEMBLE.LAMBDA_OF", [["voc"]], r"LAMBDA_OF is \[\['voc'\]\]; expected"),
    ],
)
def test_bad_configurations(generator, key, value, message):
    cfg = maft_cfg(generator)
    section, _, name = key.rpartition(".")
    cfg.MODEL.OVSEG[section][name] = value
    with pytest.raises(ValueError, match=message) as error:
        build_model(cfg)
    assert "\n" not in str(error.value)
