"""MAFT+: training, evaluation, its two parts, its checkpoints."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn
from torch.nn import functional as F

from ovseg_d2.checkpoint.key_maps import MAFT_PLUS
from ovseg_d2.modeling.losses.representation_compensation import representation_compensation_loss
from ovseg_d2.modeling.mask_classification.content_transfer import ContentDependentTransfer
from ovseg_d2.modeling.text_classifier import averaged
from ovseg_d2.structures import Vocabulary
from tests.modeling.tiny_fcclip import COLOURS, fcclip_cfg, inputs, random_fcclip

OTHERS = Vocabulary(names=("tree", "brick", "sand"), is_thing=(False, False, True))
ONE = Vocabulary(names=("red star",), is_thing=(True,))


def plus_cfg(**options):
    cfg = fcclip_cfg()
    cfg.MODEL.META_ARCHITECTURE = "MAFTPlus"
    cfg.MODEL.OVSEG.CLIP.TRAINABLE = "trunk"
    for key, value in options.items():
        setattr(cfg.MODEL.OVSEG.MAFT_PLUS, key, value)
    return cfg


@pytest.fixture(scope="module")
def model():
    return random_fcclip(plus_cfg())


def sem_seg(model, batch):
    with torch.no_grad():
        return [result["sem_seg"] for result in model.eval()(batch)]


@pytest.mark.parametrize("num_masks", [3, 0], ids=["targets", "no targets"])
def test_training_reaches_every_parameter(model, num_masks):
    model.train().zero_grad()
    losses = model(inputs((33, 70), (64, 41), num_masks=num_masks))
    assert {"loss_mask_aware", "loss_compensation", "loss_ce"} <= set(losses)
    assert all(loss.isfinite() and loss.dim() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad is None for part in (model.teacher, model.clip.text) for p in part.parameters())
    assert model.clip.visual.tower.conv1.weight.grad.abs().sum() > 0
    assert model.clip.visual.tower.attnpool.v_proj.weight.grad is None  # the head is frozen


def test_the_generator_gives_clip_no_gradient(model):
    model.train().zero_grad()
    losses = model(inputs((64, 64)))
    sum(
        loss
        for name, loss in losses.items()
        if name.startswith(("loss_ce", "loss_mask_", "loss_dice"))
        if name != "loss_mask_aware"
    ).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.clip.parameters())


def test_parts_that_are_off_are_not_built():
    model = build_model(plus_cfg(CONTENT_TRANSFER=False, RC_WEIGHT=0.0))
    assert model.content_transfer is None and model.teacher is None and model.clip.visual.dense == "none"
    losses = model.train()(inputs((64, 64)))
    assert "loss_compensation" not in losses and losses["loss_mask_aware"].isfinite()


def test_panoptic_transfer_starts_from_the_texts():
    module = ContentDependentTransfer(dim=16, num_heads=2, panoptic=True)
    rows = torch.randn(3, 16)
    out = module(rows, torch.randn(2, 16, 3, 5))
    torch.testing.assert_close(out, rows.expand(2, -1, -1))  # the norm of zeros is its bias, zero


@torch.no_grad()
@pytest.mark.parametrize("vocabulary", [COLOURS, OTHERS, ONE], ids=["four", "three", "one"])
def test_results_follow_the_vocabulary(model, vocabulary):
    batch = inputs((33, 70), (64, 41), vocabulary=vocabulary)
    for x, result in zip(batch, model.eval()(batch), strict=True):
        assert result["sem_seg"].shape == (len(vocabulary), *x["image"].shape[1:])
        assert result["sem_seg"].isfinite().all()


def test_two_vocabularies_in_one_process():
    """Train with A, evaluate A, then B: as a new model that only ever saw B. No statistics change on the way."""
    model = random_fcclip(plus_cfg())
    sum(model.train()(inputs((40, 40))).values()).backward()
    batch_a, batch_b = inputs((48, 48)), inputs((48, 48), vocabulary=OTHERS)
    first = sem_seg(model, batch_a)[0]
    torch.testing.assert_close(sem_seg(model, batch_b)[0], sem_seg(random_fcclip(plus_cfg()), batch_b)[0])
    torch.testing.assert_close(sem_seg(model, batch_a)[0], first)


def test_training_tunes_the_trunk_alone():
    torch.manual_seed(0)
    model = build_model(plus_cfg()).train()
    model.fill_missing(set())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = inputs((64, 64), (64, 48))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    compensation = []
    for _ in range(3):
        losses = model(batch)
        compensation.append(losses["loss_compensation"].item())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert compensation[0] == 0 < compensation[1]  # the tower begins as its teacher
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trunk = {name for name in changed if name.startswith("clip.")}
    assert trunk and all(name.startswith("clip.visual.tower.") and "attnpool" not in name for name in trunk)
    assert {name.split(".")[0] for name in changed} == {"clip", "content_transfer", "proposals"}
    assert not any("running" in name for name in changed)
    assert sem_seg(model, batch)[1].isfinite().all()


def test_batch_equals_single(model):
    batch = inputs((64, 40), (64, 40))
    for x, together in zip(batch, sem_seg(model, batch), strict=True):
        torch.testing.assert_close(together, sem_seg(model, [x])[0], rtol=1e-4, atol=1e-5)


def test_permuted_classes_permute_the_results(model):
    order = [2, 0, 3, 1]
    permuted = Vocabulary(
        tuple(COLOURS.names[i] for i in order),
        tuple(COLOURS.is_thing[i] for i in order),
        tuple(COLOURS.synonyms[i] for i in order),
    )
    (plain,) = sem_seg(model, inputs((48, 64)))
    (other,) = sem_seg(model, inputs((48, 64), vocabulary=permuted))
    torch.testing.assert_close(other, plain[order], rtol=1e-4, atol=1e-5)


def test_the_generator_decides_what_is_no_object(model):
    images = model.eval().preprocess(inputs((64, 64)))
    with torch.no_grad():
        probs = model.predict(images, COLOURS).class_logits.softmax(-1)
        text = model.text(COLOURS)
        generator = model.proposals(images, model.clip_features(images), averaged(text)).class_logits.softmax(-1)
    torch.testing.assert_close(probs[..., -1], generator[..., -1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(probs[..., :-1], generator[..., :-1], atol=1e-3)


def test_teacher_starts_as_the_pretrained_clip():
    model = random_fcclip(plus_cfg())
    filled = model.fill_missing({"clip.logit_scale"})
    assert filled == {f"teacher.{name}" for name in model.teacher.state_dict()}
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.teacher(images).dense, model.clip.visual(images).dense)
    assert model.fill_missing({"teacher.tower.conv1.weight"}) == set()


def test_compensation_against_plain_loops():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    differences = []
    for scale in (1, 2, 4):
        size = 6 // scale
        cells = 6 // size
        for n in range(2):
            for c in range(3):
                maps = [x[n, c].clamp(min=0) for x in (student, teacher)]
                pooled = [
                    torch.stack(
                        [
                            torch.stack(
                                [m[i * size : (i + 1) * size, j * size : (j + 1) * size].mean() for j in range(cells)]
                            )
                            for i in range(cells)
                        ]
                    )
                    for m in maps
                ]
                for dim in (0, 1):
                    differences += (pooled[0].sum(dim) - pooled[1].sum(dim)).tolist()
    expected = F.smooth_l1_loss(torch.tensor(differences), torch.zeros(len(differences)))
    torch.testing.assert_close(representation_compensation_loss(student, teacher), expected)


def test_public_names_lead_to_the_model(model):
    names = {"cdt.cross_atten.multihead_attn.in_proj_weight", "cdt.cross_atten.MLP.bias", "cdt.cross_atten.norm.weight"}
    assert MAFT_PLUS.recognises(names)
    assert {MAFT_PLUS.rename(name) for name in names} <= set(model.state_dict())


def test_a_transformer_is_refused():
    cfg = plus_cfg()
    cfg.MODEL.OVSEG.CLIP.NAME = "OVShapes-ViT"
    with pytest.raises(ValueError, match="MODEL.OVSEG.CLIP.NAME: OVShapes-ViT is a transformer; MAFT"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("HEADS", 7, "MAFT_PLUS.HEADS: got 7; expected a divisor of CLIP's 128 dimensions"),
        ("HEADS", 0, "MAFT_PLUS.HEADS: got 0"),
        ("RC_SCALES", [1, 0], r"MAFT_PLUS.RC_SCALES: got \[1, 0\]; expected one or more integers from 1"),
        ("RC_SCALES", [], "MAFT_PLUS.RC_SCALES"),
    ],
)
def test_bad_options(key, value, message):
    with pytest.raises(ValueError, match=message):
        build_model(plus_cfg(**{key: value}))


def test_compensation_of_maps_that_are_not_square():
    """The map is made square first; the cells are those of the width it had."""
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 2, 4, 6), torch.randn(1, 2, 4, 6)
    square = [F.interpolate(x.clamp(min=0), size=(6, 6), mode="bilinear") for x in (student, teacher)]
    torch.testing.assert_close(
        representation_compensation_loss(student, teacher), representation_compensation_loss(*square)
    )
    tall = representation_compensation_loss(student.mT, teacher.mT, scales=(1,))
    pooled = [F.avg_pool2d(x.mT, 4) for x in square]  # one cell of 4 x 4 in the map of 6 x 6
    torch.testing.assert_close(tall, F.smooth_l1_loss(*pooled))


def test_texts_learn_from_the_image(model):
    rows = torch.randn(4, model.clip.embed_dim)
    dense = torch.randn(2, model.clip.embed_dim, 3, 4)
    out = model.content_transfer(rows, dense)
    assert out.shape == (2, 4, model.clip.embed_dim) and not torch.allclose(out[0], out[1])
    assert isinstance(model.content_transfer.norm, nn.LayerNorm)
