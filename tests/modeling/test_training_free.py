"""A frozen CLIP that names masks and pixels, with random weights."""

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch.nn import functional as F

from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from ovseg_d2.structures import Vocabulary
from tests.helpers import numbered_vocabulary, random_input, randomise, tiny_cfg

SIZES = [(48, 72), (56, 41)]


def free_cfg(clip: str = "OVShapes-ViT", classify: str = "masks", **free: object) -> CfgNode:
    cfg = tiny_cfg(tasks=["semantic"] if classify == "dense" else ["semantic", "panoptic", "instance"])
    cfg.MODEL.META_ARCHITECTURE = "TrainingFree"
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.OVSEG.CLIP.NAME = clip
    cfg.MODEL.OVSEG.TEXT.TEMPLATES = ["single", "name"]
    cfg.MODEL.OVSEG.CROPS.SIZE = 32
    cfg.MODEL.OVSEG.TRAINING_FREE.CLASSIFY = classify
    for key, value in free.items():
        cfg.MODEL.OVSEG.TRAINING_FREE[key] = value
    return cfg


def make(cfg: CfgNode) -> torch.nn.Module:
    model = randomise(build_model(cfg)).eval()
    model.clip.logit_scale.fill_(3.0)
    return model


def inputs(num_classes: int = 5) -> list[dict]:
    return [random_input(size, num_classes=num_classes, num_masks=2, seed=i) for i, size in enumerate(SIZES)]


VARIANTS = [
    ("OVShapes-ViT", "masks", {"MASK_MODE": "maft"}),
    ("OVShapes-ViT", "masks", {"MASK_MODE": "maskclippp", "START_LAYER": 4}),
    ("OVShapes-RN", "masks", {}),
    ("OVShapes-ViT", "crops", {}),
    ("OVShapes-RN", "crops", {}),
    ("OVShapes-ViT", "dense", {"LAST_BLOCK": "value"}),
    ("OVShapes-ViT", "dense", {"LAST_BLOCK": "sclip"}),
    ("OVShapes-ViT", "dense", {"LAST_BLOCK": "clearclip"}),
    ("OVShapes-RN", "dense", {"LAST_BLOCK": "value"}),
]


@pytest.mark.parametrize(("clip", "classify", "free"), VARIANTS)
def test_results_and_batches(clip, classify, free):
    model = make(free_cfg(clip, classify, **free))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    batch = inputs()
    with torch.no_grad():
        results, turned = model(batch), model(batch[::-1])[::-1]
    for x, found, other in zip(batch, results, turned, strict=True):
        assert found["sem_seg"].shape == (5, x["height"], x["width"]) and found["sem_seg"].isfinite().all()
        assert found["sem_seg"].std() > 0
        torch.testing.assert_close(found["sem_seg"], other["sem_seg"], atol=1e-4, rtol=1e-3)
        if classify != "dense":
            assert found["panoptic_seg"][0].shape == (x["height"], x["width"])
            assert len(found["instances"]) <= 8


@pytest.mark.parametrize(("clip", "classify", "free"), [VARIANTS[0], VARIANTS[3], VARIANTS[5]])
def test_order_of_classes_and_synonyms(clip, classify, free):
    model = make(free_cfg(clip, classify, **free))
    names = ("red star", "sky", "blue ring", "grass")
    order = [2, 0, 3, 1]
    plain = Vocabulary(names=names, is_thing=(True,) * 4)
    shuffled = Vocabulary(names=tuple(names[i] for i in order), is_thing=(True,) * 4)
    merged = Vocabulary(names=("any",), is_thing=(True,), synonyms=(names,))
    with torch.no_grad():
        found, moved, one = (
            model([{**x, "vocabulary": vocabulary} for x in inputs()]) for vocabulary in (plain, shuffled, merged)
        )
    for a, b, c in zip(found, moved, one, strict=True):
        torch.testing.assert_close(a["sem_seg"][order], b["sem_seg"], atol=1e-5, rtol=1e-4)
        # One class with all the synonyms takes all that there is.
        torch.testing.assert_close(c["sem_seg"], a["sem_seg"].sum(0, keepdim=True), atol=1e-4, rtol=1e-3)


def test_no_object_comes_from_the_generator():
    cfg = free_cfg()
    vocabulary, models = numbered_vocabulary(5, 3), []
    for objectness in (True, False):
        cfg.MODEL.OVSEG.TRAINING_FREE.OBJECTNESS = objectness
        models.append(make(cfg))
    with torch.no_grad():
        images = models[0].preprocess(inputs())
        with_, without = (model.predict(images, vocabulary).class_logits.softmax(-1) for model in models)
        expected = models[0].proposals(images).class_logits.softmax(-1)[..., -1]
    torch.testing.assert_close(with_[..., -1], expected, atol=1e-5, rtol=1e-4)
    assert without[..., -1].max() < 1e-6
    torch.testing.assert_close(with_[..., :-1], without[..., :-1] * (1 - expected[..., None]), atol=1e-5, rtol=1e-4)


def test_fcclip_proposals_get_features_in_the_images_frame():
    cfg = free_cfg("OVShapes-RN", "crops")
    proposals = cfg.MODEL.OVSEG.PROPOSALS
    proposals.NAME, proposals.CLASS_HEAD = "FCCLIPProposals", "text"
    for classify, resize in [("crops", "none"), ("masks", "none"), ("masks", "square")]:
        cfg.MODEL.OVSEG.TRAINING_FREE.CLASSIFY = classify
        cfg.MODEL.OVSEG.CLIP.RESIZE, cfg.MODEL.OVSEG.CLIP.INPUT_SIZE = resize, 64
        model = make(cfg)
        with torch.no_grad():
            images = model.preprocess(inputs())
            predicted = model.predict(images, numbered_vocabulary(5, 3))
        assert predicted.mask_logits.shape[-2:] == (images.padded_size[0] // 4, images.padded_size[1] // 4)


def test_dense_scores_are_softmax_of_cosines():
    model = make(free_cfg(classify="dense", LAST_BLOCK="sclip"))
    x = inputs()[0]
    vocabulary = numbered_vocabulary(4, 2)
    with torch.no_grad():
        found = model([{**x, "vocabulary": vocabulary}])[0]["sem_seg"]
        normalised = (x["image"] - model.pixel_mean) / model.pixel_std
        clip_image = (normalised * model.pixel_std + model.pixel_mean - torch.tensor(CLIP_PIXEL_MEAN).view(3, 1, 1)) / (
            torch.tensor(CLIP_PIXEL_STD).view(3, 1, 1)
        )
        dense = model.clip.visual(clip_image[None]).dense  # 48 x 72 is a whole number of patches
        text = model.text_classifier(model.clip.text, vocabulary).embeds.mean(1)
        cosine = torch.einsum("ndhw,kd->nkhw", F.normalize(dense, dim=1), F.normalize(text, dim=-1))
        logits = F.interpolate(cosine * model.clip.scale(), size=(48, 72), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, logits.softmax(1)[0], atol=1e-5, rtol=1e-3)


def test_clip_sees_its_own_size_and_colours(monkeypatch):
    cfg = free_cfg()
    cfg.MODEL.OVSEG.CLIP.RESIZE, cfg.MODEL.OVSEG.CLIP.INPUT_SIZE = "square", 40
    model = make(cfg)
    assert tuple(model.pixel_mean.flatten().tolist()) != CLIP_PIXEL_MEAN
    seen = []
    encode, embed = model.clip.visual.encode_masks, model.clip.visual.embed
    monkeypatch.setattr(
        model.clip.visual, "embed", lambda images, prompts: seen.append(images) or embed(images, prompts)
    )
    monkeypatch.setattr(
        model.clip.visual, "encode_masks", lambda features, masks: seen.append(masks) or encode(features, masks)
    )
    batch = inputs()
    batch[0]["image"] = torch.tensor(CLIP_PIXEL_MEAN).view(3, 1, 1).expand(3, 48, 72)
    with torch.no_grad():
        model(batch)
    pictures, masks = seen
    assert pictures.shape == (2, 3, 40, 40) and masks.shape == (2, 6, 40, 40)
    assert pictures[0].abs().max() < 1e-5 and pictures[1].abs().max() > 0.1
    assert 0 <= masks.min() and masks.max() <= 1


def test_masks_out_of_files():
    cfg = free_cfg(classify="crops")
    cfg.MODEL.OVSEG.PROPOSALS.NAME = "PrecomputedProposals"
    model = make(cfg)
    batch = inputs()
    batch[0]["proposals"] = torch.zeros(2, *SIZES[0], dtype=torch.bool)
    batch[0]["proposals"][0, :20] = True  # the other one is empty; what is left over is a third
    batch[1]["proposals"] = torch.zeros(0, *SIZES[1], dtype=torch.bool)
    with torch.no_grad():
        found = model(batch)
        predicted = model.predict(model.preprocess(batch), numbered_vocabulary(5, 3))
    assert predicted.valid.tolist() == [[True, False, True], [True, False, False]]
    probs = predicted.class_logits.softmax(-1)
    torch.testing.assert_close(probs[..., -1], (~predicted.valid).float(), atol=1e-6, rtol=0)
    # Masks do not overlap and cover everything, so that every pixel's scores sum to one.
    for result in found:
        torch.testing.assert_close(result["sem_seg"].sum(0), torch.ones(result["sem_seg"].shape[1:]), atol=1e-4, rtol=0)
    labels = found[0]["sem_seg"].argmax(0)
    assert len(labels[:20].unique()) == len(labels[20:].unique()) == 1
    assert len(found[1]["panoptic_seg"][1]) == 1
    with pytest.raises(ValueError, match="no masks came with image"):
        model(inputs())


@pytest.mark.parametrize(
    ("classify", "change", "message"),
    [
        ("pixels", {}, "TRAINING_FREE.CLASSIFY is 'pixels'; allowed are crops, masks, dense"),
        ("dense", {"MODEL.OVSEG.TEST.TASKS": ["semantic", "panoptic"]}, "'dense' knows no objects"),
        (
            "dense",
            {"MODEL.OVSEG.CLIP.NAME": "OVShapes-RN", "MODEL.OVSEG.TRAINING_FREE.LAST_BLOCK": "sclip"},
            "no transf",
        ),
        ("dense", {"MODEL.OVSEG.TRAINING_FREE.LAST_BLOCK": "sclap"}, "last_block is 'sclap'"),
        ("masks", {"INPUT.FORMAT": "BGR"}, "INPUT.FORMAT is 'BGR'; CLIP expects RGB"),
    ],
)
def test_bad_configs(classify, change, message):
    cfg = free_cfg(classify=classify)
    cfg.merge_from_list([item for pair in change.items() for item in pair])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_there_is_nothing_to_train():
    model = make(free_cfg()).train()
    with pytest.raises(ValueError, match="nothing to train; evaluate it with --eval-only"):
        model(inputs())
