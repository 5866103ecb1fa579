"""MaskCLIP++: what it trains on and from, with which similarities, and what it makes of masks in evaluation."""

import logging

import pytest
import torch
from detectron2.modeling import build_model
from torch.nn import functional as F

from ovseg_d2.modeling.losses.mask_classification import MaskClassificationLoss
from ovseg_d2.modeling.mask_classification.build_similarity import SIMILARITIES
from ovseg_d2.modeling.mask_classification.region_priors import PRIORS
from ovseg_d2.modeling.meta_arch import maskclippp
from ovseg_d2.structures import Vocabulary
from tests.modeling.tiny_fcclip import COLOURS
from tests.modeling.tiny_hosts import ONE, OTHERS, host_inputs, sem_seg
from tests.modeling.tiny_maskclippp import convnext_json, maskclippp_cfg, random_maskclippp

CLIPS = ["OVShapes-ViT", "OVShapes-RN", "ConvNeXt"]
SIZES = [(65, 102), (96, 71)]
#: Whose masks are several positions of a ResNet's last map, so that attention has a choice.
LARGE = [(150, 230), (225, 161)]


@pytest.fixture(scope="module")
def convnext(tmp_path_factory):
    return convnext_json(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module", params=CLIPS)
def clip(request, convnext):
    return convnext if request.param == "ConvNeXt" else request.param


@pytest.fixture(scope="module")
def model():
    return random_maskclippp()


def loss_of(model, batch):
    (loss,) = model(batch).values()
    assert loss.isfinite() and loss.dim() == 0
    return loss


def without_gradient(model):
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("similarity", ["linear", "pseudo_text"])
def test_training_reaches_every_parameter(clip, similarity):
    cfg = maskclippp_cfg(clip, SIMILARITY=similarity)
    model = random_maskclippp(cfg).train()
    loss_of(model, host_inputs(*(LARGE if clip == "OVShapes-RN" else SIZES))).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"clip", "similarity"}
    # A constant on all logits changes nothing; a linear similarity learns none.
    unused = [name for name, p in trained.items() if p.grad is None or not p.grad.abs().max() > 1e-12]
    assert set(unused) <= {"similarity.expand.bias", "similarity.reduce.bias", "similarity.attn.in_proj_bias"}
    assert not any(name.startswith(("clip.text", "clip.logit_scale", "proposals")) for name in trained)


@pytest.mark.parametrize(
    ("similarity", "prior"),
    [*((similarity, "masks") for similarity in SIMILARITIES), *(("pseudo_text", prior) for prior in PRIORS[1:])],
)
def test_every_similarity_and_every_prior_trains(similarity, prior):
    model = random_maskclippp(maskclippp_cfg(PRIOR=prior, SIMILARITY=similarity)).train()
    loss_of(model, host_inputs((48, 56))).backward()
    assert any(p.grad is not None and p.grad.any() for p in model.clip.visual.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.similarity.parameters()) or similarity == "cosine"


def test_no_masks_give_a_zero_to_every_parameter(clip):
    model = random_maskclippp(maskclippp_cfg(clip)).train()
    loss = loss_of(model, host_inputs(*SIZES, num_masks=0))
    loss.backward()
    assert loss.item() == 0 and without_gradient(model) == []


def test_masks_without_area_are_left_out_and_counted(clip, monkeypatch):
    lines = []
    monkeypatch.setattr(
        maskclippp, "log_every_n_seconds", lambda level, message, **kwargs: lines.append((level, message))
    )
    model = random_maskclippp(maskclippp_cfg(clip)).train()
    batch = host_inputs((160, 224))
    expected = loss_of(model, batch)
    assert lines == []
    instances = batch[0]["instances"]
    empty = instances[:1]
    empty.gt_masks.tensor = torch.zeros_like(empty.gt_masks.tensor)
    batch[0]["instances"] = type(instances).cat([instances, empty])
    torch.testing.assert_close(loss_of(model, batch), expected)
    ((level, message),) = lines
    assert level == logging.WARNING and "1 masks had no area" in message and "left out" in message
    model.ignore_empty = False
    assert (loss_of(model, batch) - expected).abs() > 5e-6
    for x in batch:
        x["instances"].gt_masks.tensor = torch.zeros_like(x["instances"].gt_masks.tensor)
    model.ignore_empty = True
    assert loss_of(model, batch).item() == 0


def test_a_batch_is_the_mean_of_its_images(clip):
    model = random_maskclippp(maskclippp_cfg(clip, SIMILARITY="pseudo_text")).train()
    for module in model.modules():  # what a batch shares, or draws
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.MultiheadAttention | torch.nn.Dropout):
            module.eval()
    model.training_text = lambda vocabulary: model.text(ONE_SYNONYM)
    batch = host_inputs((64, 96), (64, 96), num_masks=2)
    batch[1]["instances"] = batch[1]["instances"][:1]
    for module in model.clip.visual.modules():
        if "drop" in type(module).__name__.lower():
            module.eval()
    both = loss_of(model, batch)
    torch.testing.assert_close(both, (loss_of(model, batch[:1]) + loss_of(model, batch[1:])) / 2, rtol=1e-4, atol=1e-5)


ONE_SYNONYM = Vocabulary(names=COLOURS.names, is_thing=COLOURS.is_thing)


def test_masks_stay_on_their_pixels_whatever_the_padding(clip):
    """CLIP's copy is padded to whole patches, the batch with its masks to SIZE_DIVISIBILITY: two frames."""
    model = random_maskclippp(maskclippp_cfg(clip)).train()
    model.training_text = lambda vocabulary: model.text(ONE_SYNONYM)
    batch = host_inputs((152, 200), (136, 224))
    losses = []
    for divisibility in (0, 64):
        model.size_divisibility = divisibility
        losses.append(loss_of(model, batch))
    torch.testing.assert_close(*losses)


def test_the_loss_is_that_of_the_paper(model):
    """Soft pooling by hand is in the parity; here, that masks, texts, scale and loss come together."""
    model.train()
    batch = host_inputs((64, 64))
    step = model.step()
    model.step = lambda: step
    loss = loss_of(model, batch)
    images = model.preprocess(batch)
    text = model.training_text(COLOURS)
    instances = batch[0]["instances"]
    features = model.clip.visual(images.tensor)
    masks = F.interpolate(instances.gt_masks.tensor[None].float(), size=features.grid, mode="bilinear")
    embeds = model.clip.visual.encode_masks(features, masks)
    logits = model.similarity(embeds, text, scale=model.clip.scale())[0]
    expected = MaskClassificationLoss()(logits, instances.gt_classes, torch.zeros(len(instances), dtype=torch.int64))
    torch.testing.assert_close(loss, expected)


def test_a_synonym_is_drawn_anew_in_each_step(model):
    model.train()
    model.step, model.seed = iter(range(100)).__next__, 7
    texts = [model.training_text(COLOURS) for _ in range(20)]
    full = model.text(COLOURS)
    assert all(text.embeds.shape[0] == 4 and text.class_ids.tolist() == [0, 1, 2, 3] for text in texts)
    drawn = {int((full.embeds == text.embeds[:1]).flatten(1).all(1).nonzero()) for text in texts}
    assert drawn == {0, 1}
    model.step = iter(range(100)).__next__
    again = [model.training_text(COLOURS) for _ in range(20)]
    assert all(torch.equal(a.embeds, b.embeds) for a, b in zip(texts, again, strict=True))


def test_the_text_tower_trains_where_it_shall():
    cfg = maskclippp_cfg()
    cfg.MODEL.OVSEG.TEXT.TRAINABLE = "attention_in"
    model = random_maskclippp(cfg).train()
    loss_of(model, host_inputs((48, 56))).backward()
    trained = {name for name, p in model.clip.text.named_parameters() if p.grad is not None and p.grad.any()}
    assert "positional_embedding" in trained and any("in_proj_weight" in name for name in trained)
    before = sem_seg(model, host_inputs((48, 56)))[0]
    with torch.no_grad():
        model.clip.text.positional_embedding.add_(0.3 * torch.randn_like(model.clip.text.positional_embedding))
    model.train()
    assert not torch.allclose(before, sem_seg(model, host_inputs((48, 56)))[0])


def test_training_steps_lower_the_loss(clip):
    torch.manual_seed(0)
    model = random_maskclippp(maskclippp_cfg(clip)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch, losses = host_inputs((64, 64)), []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(loss_of(model, batch))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-3


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_evaluation(similarity):
    model = random_maskclippp(maskclippp_cfg(SIMILARITY=similarity))
    for scores, size in zip(sem_seg(model, host_inputs(*SIZES)), SIZES, strict=True):
        assert scores.shape == (4, *size) and scores.std() > 0
    batch = host_inputs((65, 102), (65, 102))  # a ViT sees the padding
    for scores, x in zip(sem_seg(model, batch), batch, strict=True):
        torch.testing.assert_close(scores, sem_seg(model, [x])[0], rtol=1e-4, atol=1e-5)


def test_the_similarity_can_be_left_out_in_evaluation(model):
    batch = host_inputs((64, 64))
    tuned = sem_seg(model, batch)[0]
    model.similarity_at_test = False
    cosines = sem_seg(model, batch)[0]
    model.similarity_at_test = True
    plain = random_maskclippp(maskclippp_cfg(SIMILARITY="cosine"))
    plain.clip.load_state_dict(model.clip.state_dict())
    assert not torch.allclose(tuned, cosines)
    torch.testing.assert_close(cosines, sem_seg(plain, batch)[0])


def test_permuted_and_other_vocabularies(model):
    order = [2, 0, 3, 1]
    permuted = Vocabulary(
        names=tuple(COLOURS.names[i] for i in order),
        is_thing=tuple(COLOURS.is_thing[i] for i in order),
        synonyms=tuple(COLOURS.synonyms[i] for i in order),
    )
    (scores,) = sem_seg(model, host_inputs((64, 64)))
    (moved,) = sem_seg(model, [x | {"vocabulary": permuted} for x in host_inputs((64, 64))])
    torch.testing.assert_close(moved, scores[order])
    mixed = [x | {"vocabulary": v} for x, v in zip(host_inputs((64, 64), (40, 56)), (OTHERS, ONE), strict=True)]
    other, one = sem_seg(model, mixed)
    assert other.shape == (3, 64, 64) and one.shape == (1, 40, 56)


def test_an_image_without_masks(clip):
    cfg = maskclippp_cfg(clip, "GroundTruthProposals")
    cfg.MODEL.OVSEG.TEST.TASKS = ["semantic", "panoptic", "instance", "mask_accuracy"]
    model = random_maskclippp(cfg).eval()
    batch = host_inputs((64, 64), (40, 56))
    batch[0]["proposals"] = batch[0]["proposals"][:0]
    with torch.no_grad():
        for x, result in zip(batch, model(batch), strict=True):
            assert result["sem_seg"].isfinite().all() and result["mask_class_probs"].isfinite().all()
            assert result["mask_class_probs"].shape == (len(x["proposals"]), 4)
        (alone,) = model(batch[:1])
    assert alone["sem_seg"].isfinite().all() and alone["mask_class_probs"].shape == (0, 4)


def test_mask_accuracy_ranks_the_classes_of_the_masks(model):
    cfg = maskclippp_cfg(generator="GroundTruthProposals")
    cfg.MODEL.OVSEG.TEST.TASKS = ["mask_accuracy"]
    model = random_maskclippp(cfg).eval()
    with torch.no_grad():
        results = model(host_inputs(*SIZES))
    for result in results:
        assert set(result) == {"mask_class_probs"}
        torch.testing.assert_close(result["mask_class_probs"].sum(-1), torch.ones(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"SIMILARITY": "psm"}, "MASKCLIPPP.SIMILARITY is 'psm'; allowed are cosine, linear"),
        ({"PRIOR": "points"}, "MASKCLIPPP.PRIOR is 'points'; allowed are masks, boxes, pixels, matched"),
        ({"LOSS": "focal"}, "MASKCLIPPP.LOSS is 'focal'; allowed are ce, bce"),
        ({"START_LAYER": 99}, "start_layer is 99; expected -"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(maskclippp_cfg(**options))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("HEADS", 7, "PSEUDO_TEXT.HEADS: got 7; expected a divisor of CLIP's"),
        ("FROM", "text", "PSEUDO_TEXT.FROM is 'text'; allowed are dense, image"),
    ],
)
def test_bad_options_of_pseudo_texts(key, value, message):
    cfg = maskclippp_cfg(SIMILARITY="pseudo_text")
    cfg.MODEL.OVSEG.MASKCLIPPP.PSEUDO_TEXT[key] = value
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_training_needs_the_names_of_its_classes(model):
    batch = host_inputs((40, 40))
    del batch[0]["vocabulary"]
    with pytest.raises(ValueError, match="no class names"):
        model.train()(batch)
