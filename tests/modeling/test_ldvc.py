"""LDVC and ZegCLIP as whole models."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn
from torch.nn import functional as F

from ovseg_d2.engine.optimizer import build_optimizer
from ovseg_d2.modeling.clip.build import clip_tokenizer
from ovseg_d2.modeling.losses.pixel_losses import pixel_labels
from ovseg_d2.structures import Vocabulary
from tests.helpers import numbered_vocabulary
from tests.modeling.tiny_ldvc import NUM_CLASSES, SEEN, inputs, ldvc_cfg, make, split_vocabulary, without_dropout

FROZEN = {"VISUAL_PROMPTS": 0, "TEXT_PROMPTS": 0}
VARIANTS = [
    ("LDVC", {}),
    ("LDVC", {"TOP_K": 0, "TEXT_PROMPTS": 0, "TAPS": [5], "AUX_WEIGHT": 0.5}),
    ("LDVC", {"PROMPT_PROJ": False, "PROMPT_NORM": False, "TAP_NORM": True, "SCALE": "dim", "AUX_WEIGHT": 0.5}),
    ("LDVC", {**FROZEN, "MASK_IGNORED": True, "EXTRA_CLASS_EMBEDDING": False, "POSITION_SIZE": 0}),
    ("ZegCLIP", {"TEXT_PROMPTS": 0}),
    ("ZegCLIP", {}),
]
IDS = ["ldvc", "no-lcsa-visual", "plain-prompts", "frozen", "zegclip", "zegclip-both"]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_a_gradient_for_every_trained_parameter(name, options):
    model = make(ldvc_cfg(name, **options)).train()
    expected = {"loss_focal", "loss_dice"}
    if options.get("AUX_WEIGHT") and len(options.get("TAPS", [5, 3])) > 1:
        expected |= {"loss_focal_0", "loss_dice_0"}
    for num_masks in (0, 3):
        model.zero_grad()
        losses = model(inputs(num_masks=num_masks))
        assert set(losses) == expected
        assert num_masks or float(losses["loss_dice"].detach()) == 0
        total = sum(losses.values())
        assert torch.isfinite(total)
        total.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained if not n.startswith("clip.visual.prompts.")} <= {
        *("text_adapter", "decoder", "text_prompts")
    }
    assert ("text_prompts.prompts" in trained) == (options.get("TEXT_PROMPTS", 6) > 0)
    if options.get("VISUAL_PROMPTS", 3):
        assert all(model.clip.visual.prompts.embeddings.grad.flatten(1).any(1))


@pytest.mark.parametrize(("name", "options"), VARIANTS[1:5], ids=IDS[1:5])
@torch.no_grad()
def test_results_and_batches(name, options):
    """Pictures that are not square, a map that windows of 4 x 4 do not divide, one that is smaller than a window."""
    model = make(ldvc_cfg(name, **options))
    for sizes in [((40, 56), (40, 52)), ((24, 17), (20, 24))]:
        batch = inputs(*sizes)
        batch[1]["height"], batch[1]["width"] = 33, 50
        results, alone = model(batch), model(batch[1:])
        for x, result in zip(batch, results, strict=True):
            sem_seg = result["sem_seg"]
            assert set(result) == {"sem_seg"} and sem_seg.shape == (NUM_CLASSES, x["height"], x["width"])
            assert 0 <= sem_seg.min() and sem_seg.max() <= 1
            assert (sem_seg.std(dim=(1, 2)) / sem_seg.mean(dim=(1, 2))).max() > 1e-3
        # A single image of the second's size is padded alike.
        torch.testing.assert_close(results[1]["sem_seg"], alone[0]["sem_seg"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["LDVC", "ZegCLIP"])
@torch.no_grad()
def test_the_order_of_classes_does_not_matter(name):
    model = make(ldvc_cfg(name))
    (x,) = inputs((64, 64))
    order = [3, 0, 4, 2, 1]
    names = x["vocabulary"].names
    other = Vocabulary(names=tuple(names[i] for i in order), is_thing=(True,) * NUM_CLASSES)
    first, second = model([x])[0]["sem_seg"], model([{**x, "vocabulary": other}])[0]["sem_seg"]
    torch.testing.assert_close(second, first[order], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("num_classes", [1, 11])
@pytest.mark.parametrize("name", ["LDVC", "ZegCLIP"])
def test_vocabularies_of_any_size(name, num_classes):
    model = make(ldvc_cfg(name))
    batch = inputs()
    for x in batch:
        x["vocabulary"] = numbered_vocabulary(num_classes, 1)
        x["instances"].gt_classes %= num_classes
    with torch.no_grad():
        sem_seg = model(batch)[0]["sem_seg"]
    assert len(sem_seg) == num_classes and torch.isfinite(sem_seg).all()
    assert all(torch.isfinite(loss) for loss in model.train()(batch).values())


@torch.no_grad()
def test_two_vocabularies_and_a_step_of_training_in_one_process():
    model = make(ldvc_cfg())
    x = inputs((64, 64))[0]
    other = {**x, "vocabulary": numbered_vocabulary(3, 1)}
    together = model([x, other])
    assert [len(result["sem_seg"]) for result in together] == [NUM_CLASSES, 3]
    torch.testing.assert_close(together[1]["sem_seg"], model([other])[0]["sem_seg"])
    optimizer = torch.optim.SGD(model.text_prompts.parameters(), lr=1.0)
    with torch.enable_grad():
        sum(model.train()([x]).values()).backward()
    optimizer.step()
    model.eval()
    assert not torch.allclose(model([x])[0]["sem_seg"], together[0]["sem_seg"], atol=1e-5)


@torch.no_grad()
def test_windows_are_averaged_as_scores():
    cfg = ldvc_cfg()
    sliding = cfg.MODEL.OVSEG.TEST.SLIDING
    sliding.SIZE, sliding.STRIDE, sliding.BATCH = 48, 40, 3
    model = make(cfg)
    batch = inputs((64, 96), (50, 41))
    for x, result in zip(batch, model(batch), strict=True):
        size = (x["height"], x["width"])
        image = model.preprocess([x]).tensor[:, :, : size[0], : size[1]]
        span = [min(48, n) for n in size]
        total, count = torch.zeros(1, NUM_CLASSES, *size), torch.zeros(size)
        for top in sorted({0, max(size[0] - 48, 0)}):
            for left in sorted({*range(0, max(size[1] - 48, 0), 40), max(size[1] - 48, 0)}):
                place = (..., slice(top, top + span[0]), slice(left, left + span[1]))
                logits = model.pixel_logits(image[place], x["vocabulary"])
                total[place] += F.interpolate(logits, size=span, mode="bilinear").sigmoid()
                count[place] += 1
        torch.testing.assert_close(result["sem_seg"], (total / count)[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_windows_need_not_be_made_of_whole_patches():
    """What a patch does not fill is padded, so that logits stay over their pixels; the same of an image of 5 x 3."""
    model = make(ldvc_cfg())
    (x,) = inputs((48, 56))
    images = model.preprocess([x]).tensor
    for height, width in ((43, 50), (5, 3)):
        padding = (0, -width % 8, 0, -height % 8)
        padded = F.pad(images[..., :height, :width], padding)
        expected = F.interpolate(model.pixel_logits(padded, x["vocabulary"]), size=padded.shape[-2:], mode="bilinear")
        got = model.pixel_logits(images[..., :height, :width], x["vocabulary"])
        torch.testing.assert_close(got, expected[..., :height, :width])


# ---- what the method is


@torch.no_grad()
def test_both_decoders_see_what_clip_gives():
    """Equations 3 and 13: unit vectors of pixels and image, raw maps of the blocks, in the order of TAPS."""
    model = make(ldvc_cfg())
    (x,) = inputs((64, 64))
    images = model.preprocess([x]).tensor
    features, text = model.clip.visual(images), model.text(x["vocabulary"]).embeds[:, 0]
    dense, adapted, layers = model.encode(images, x["vocabulary"])
    torch.testing.assert_close(dense, F.normalize(features.dense, dim=1))
    torch.testing.assert_close(dense.norm(dim=1), torch.ones(1, 8, 8))
    image = F.normalize(features.image_embeds, dim=1)
    torch.testing.assert_close(adapted, model.text_adapter(image, text))
    torch.testing.assert_close(layers[0], features.layers["block5"])
    torch.testing.assert_close(layers[1], features.layers["block3"])
    expected = model.decoder(dense, adapted, layers)
    torch.testing.assert_close(model.pixel_logits(images, x["vocabulary"]), expected)


@torch.no_grad()
def test_fixed_texts_are_the_mean_of_the_sentences():
    model = make(ldvc_cfg("ZegCLIP", TEXT_PROMPTS=0))
    vocabulary = numbered_vocabulary(2, 1)
    tokens = clip_tokenizer("OVShapes-ViT")
    embeds = [
        F.normalize(model.clip.text(tokens([s.format(name) for name in vocabulary.names])), dim=1)
        for s in ("a photo of a {}.", "There is a {}.")
    ]
    expected = F.normalize(sum(embeds) / 2, dim=1)
    torch.testing.assert_close(model.text(vocabulary).embeds[:, 0], expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_text_prompts_start_as_a_template():
    """Then the prompted tower is plain CLIP on the sentence."""
    model = make(ldvc_cfg())
    before = model.text_prompts.prompts.clone()
    assert model.fill_missing({"text_prompts.prompts"}) == set()
    assert torch.equal(model.text_prompts.prompts, before)
    assert model.fill_missing(set()) == {"text_prompts.prompts"}
    vocabulary = Vocabulary(
        names=("red circle", "sky"), is_thing=(True, False), synonyms=(("red circle, disc",), ("sky",))
    )
    sentences = ["this is a photo of a red circle", "this is a photo of a sky"]
    expected = F.normalize(model.clip.text(clip_tokenizer("OVShapes-ViT")(sentences)), dim=1)
    torch.testing.assert_close(model.text(vocabulary).embeds[:, 0], expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_random_text_prompts_stay_random():
    """Table 6."""
    model = make(ldvc_cfg(TEXT_INIT=""))
    before = model.text_prompts.prompts.clone()
    assert model.fill_missing(set()) == set() and torch.equal(model.text_prompts.prompts, before)


def test_the_auxiliary_loss_is_of_the_first_block():
    model = without_dropout(make(ldvc_cfg(**VARIANTS[2][1]))).train()
    batch = inputs((64, 64))
    images = model.preprocess(batch)
    labels = pixel_labels(model.targets(batch, images.padded_size), images.padded_size)
    first, last = model.decode(*model.encode(images.tensor, batch[0]["vocabulary"]))
    losses = model(batch)
    torch.testing.assert_close(losses["loss_focal"], model.loss(last, labels)["loss_focal"])
    torch.testing.assert_close(losses["loss_dice_0"], 0.5 * model.loss(first, labels)["loss_dice"])


def test_everything_is_decayed_alike():
    """ZegCLIP's recipe: norms, biases and prompts, too."""
    cfg = ldvc_cfg()
    cfg.SOLVER.WEIGHT_DECAY = cfg.SOLVER.WEIGHT_DECAY_NORM = cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.01
    cfg.SOLVER.LR_FACTORS = []
    (group,) = build_optimizer(cfg, make(ldvc_cfg())).param_groups
    assert group["weight_decay"] == 0.01


# ---- settings


def with_split(batch):
    return [{**x, "vocabulary": split_vocabulary()} for x in batch]


@torch.no_grad()
def test_seen_classes_are_calibrated_in_the_inductive_setting_alone():
    cfg = ldvc_cfg()
    batch = with_split(inputs((40, 40)))
    plain = make(cfg)(batch)[0]["sem_seg"]
    cfg.MODEL.OVSEG.ENSEMBLE.CALIBRATE = 0.1
    expected = plain - 0.1 * torch.tensor(SEEN)[:, None, None]
    torch.testing.assert_close(make(cfg)(batch)[0]["sem_seg"], expected)
    cfg.MODEL.WEIGHTS = "some.pth"
    for setting in ("transductive", "supervised"):
        cfg.MODEL.OVSEG.LDVC.SETTING = setting
        torch.testing.assert_close(make(cfg)(batch)[0]["sem_seg"], plain)


@pytest.mark.parametrize("name", ["LDVC", "ZegCLIP"])
def test_self_training_does_not_read_which_unseen_class_it_is(name):
    cfg = ldvc_cfg(name, SETTING="transductive")
    cfg.MODEL.WEIGHTS = "some.pth"
    model = without_dropout(make(cfg)).train()
    batch = with_split(inputs((40, 40), (40, 32)))
    classes = [torch.tensor([0, 1, 4]), torch.tensor([1, 2, 1])]
    for x, ids in zip(batch, classes, strict=True):
        x["instances"].gt_classes = ids
    losses = {name: float(loss.detach()) for name, loss in model(batch).items()}
    for x, ids in zip(batch, classes, strict=True):
        x["instances"].gt_classes = torch.where(ids == 1, 4, torch.where(ids == 4, 1, ids))
    swapped = model(batch)
    assert {name: float(loss.detach()) for name, loss in swapped.items()} == pytest.approx(losses, rel=1e-5)
    sum(swapped.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    # With the labels of the files it is another loss.
    labelled = without_dropout(make(ldvc_cfg(name))).train()(batch)
    assert float(labelled["loss_focal"].detach()) != pytest.approx(losses["loss_focal"], rel=1e-5)


@torch.no_grad()
def test_masks_of_a_generator_get_classes():
    cfg = ldvc_cfg(tasks=("semantic", "panoptic"))
    cfg.MODEL.OVSEG.TEST.MASK_VOTING = True
    model = make(cfg)
    for x, result in zip(inputs(), model(inputs()), strict=True):
        assert set(result) == {"sem_seg", "panoptic_seg"}
        assert result["panoptic_seg"][0].shape == (x["height"], x["width"])


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"SETTING": "zero-shot"}, "LDVC.SETTING is 'zero-shot'; allowed are inductive, transductive, supervised"),
        ({"SETTING": "transductive"}, "MODEL.WEIGHTS is empty; expected the checkpoint"),
        ({"TAPS": []}, "LDVC.TAPS is empty; expected a block"),
        ({"TAPS": [8]}, "block8"),
        ({"HEADS": 3}, "LDVC.HEADS is 3"),
        ({"SCALE": "none"}, "LDVC.SCALE is 'none'"),
        ({"WINDOW_SIZE": 0}, "LDVC.WINDOW_SIZE is 0"),
        ({"TOP_K": -1}, "LDVC.TOP_K is -1"),
        ({"POSITION_SIZE": 50}, "LDVC.POSITION_SIZE: got 50; expected a multiple of the patches' 8 pixels"),
        ({"TEXT_PROMPTS": 4}, "MODEL.OVSEG.LDVC.TEXT_INIT.* 6 .* 4 "),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message) as error, torch.device("meta"):
        build_model(ldvc_cfg(**options))
    assert "\n" not in str(error.value)


def test_a_clip_that_is_no_vit():
    cfg = ldvc_cfg("ZegCLIP")
    cfg.MODEL.OVSEG.CLIP.NAME = "OVShapes-RN"
    with pytest.raises(ValueError, match="OVShapes-RN is of the kind 'resnet'; ZegCLIP takes a ViT"):
        make(cfg)


def test_self_training_from_clip_alone():
    cfg = ldvc_cfg(SETTING="transductive")
    cfg.MODEL.WEIGHTS = "some.pth"
    model = make(cfg)
    given = {name for name in model.state_dict() if not name.startswith(("decoder", "text_prompts"))}
    with pytest.raises(ValueError, match="'transductive', but MODEL.WEIGHTS has no text_prompts|has no decoder"):
        model.fill_missing(given)
    assert model.fill_missing(set(model.state_dict())) == set()


def test_prompts_without_a_projection_have_no_weights_for_it():
    model = make(ldvc_cfg(**VARIANTS[2][1]))
    assert {n for n, _ in model.clip.visual.prompts.named_parameters()} == {"embeddings"}
    assert isinstance(model.clip.visual.prompts.proj, nn.Identity)
