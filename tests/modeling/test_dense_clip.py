"""DenseCLIP and its plain baseline on the tiny CLIPs of the package, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn
from torch.nn import functional as F

from ovseg_d2.engine.load_config import load_config
from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from ovseg_d2.structures import Vocabulary
from tests.helpers import numbered_vocabulary, random_input, randomise, tiny_cfg

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "dense_clip"
NUM_CLASSES = 5
TOWERS = ["OVShapes-RN", "OVShapes-ViT"]
SIZES = [(70, 96), (64, 41)]


def dense_cfg(clip: str = "OVShapes-RN", **options: Any) -> CfgNode:
    cfg = tiny_cfg(num_classes=NUM_CLASSES, tasks=["semantic"])
    cfg.MODEL.META_ARCHITECTURE = "DenseCLIP"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = list(CLIP_PIXEL_MEAN), list(CLIP_PIXEL_STD)
    cfg.MODEL.CLIP_VIT_FPN.OUT_BLOCKS = [1, 3, 5, 7]
    cfg.MODEL.OVSEG.CLIP.NAME, cfg.MODEL.OVSEG.CLIP.TRAINABLE = clip, "full"
    cfg.MODEL.OVSEG.TEXT.TEMPLATES = ["name"]
    dense = cfg.MODEL.OVSEG.DENSE_CLIP
    dense.DIM, dense.DECODER_DIM, dense.DECODER_LAYERS = 32, 32, 1
    dense.CONTEXT_LENGTH, dense.TEXT_LENGTH = 3, 9
    for key, value in options.items():
        dense[key] = value
    return cfg


def make(cfg: CfgNode) -> nn.Module:
    model = randomise(build_model(cfg))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm)):
                module.weight.add_(1.0)
    return model.eval()


def inputs(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    return [random_input(size, num_classes=NUM_CLASSES, num_masks=3, seed=i) for i, size in enumerate(sizes or SIZES)]


@pytest.mark.parametrize("clip", TOWERS)
@pytest.mark.parametrize("text", [True, False])
def test_results_are_probabilities_and_batches_change_nothing(clip, text):
    model = make(dense_cfg(clip, TEXT=text))
    batch = inputs((64, 96), (64, 96))
    batch[1]["height"], batch[1]["width"] = 33, 50
    with torch.no_grad():
        results, alone = model(batch), model(batch[1:])
    for x, result in zip(batch, results, strict=True):
        sem_seg = result["sem_seg"]
        assert set(result) == {"sem_seg"} and sem_seg.shape == (NUM_CLASSES, x["height"], x["width"])
        torch.testing.assert_close(sem_seg.sum(0), torch.ones(x["height"], x["width"]))
        assert sem_seg.std(dim=(1, 2)).max() > 1e-3
    torch.testing.assert_close(results[1]["sem_seg"], alone[0]["sem_seg"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("clip", TOWERS)
@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("empty", [True, False])
def test_a_gradient_for_every_trained_parameter(clip, text, empty):
    model = make(dense_cfg(clip, TEXT=text)).train()
    assert not model.clip.text.training and not any(p.requires_grad for p in model.clip.text.parameters())
    batch = inputs()
    for x in batch if empty else []:
        x["instances"] = x["instances"][:0]
    losses = model(batch)
    assert set(losses) == ({"loss_sem_seg", "loss_score"} if text else {"loss_sem_seg"})
    total = sum(losses.values())
    total.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    if empty:
        assert total.item() == 0
    elif text:
        assert model.scores.contexts.contexts.grad.abs().sum() > 0


@pytest.mark.parametrize(("clip", "feature"), [("OVShapes-RN", "res5"), ("OVShapes-ViT", "res4")])
@torch.no_grad()
def test_scores_by_hand(clip, feature):
    model, seen = make(dense_cfg(clip)), {}
    model.head.register_forward_pre_hook(lambda _, args: seen.update(args[0]))
    vocabulary = numbered_vocabulary(NUM_CLASSES, 3)
    images = torch.randn(2, 3, 64, 96)
    _, scores = model.logits_and_scores(images, vocabulary)

    part, features = model.scores, model.clip.visual(images)
    tokens = model.text_classifier.tokenizer(list(vocabulary.names))
    text = model.clip.text(tokens, contexts=part.contexts.contexts)[0]
    # Not of unit length: gamma weighs against the length that the tower gives.
    assert not torch.allclose(text.norm(dim=-1), torch.ones(NUM_CLASSES))
    for i in range(2):
        positions = features.dense[i].flatten(1).T
        memory = torch.cat([features.image_embeds[i : i + 1], positions])[None]
        aware = text + part.gamma * part.context_decoder(text[None], memory)[0]
        expected = F.cosine_similarity(aware[:, None], positions[None], dim=-1)
        torch.testing.assert_close(scores[i].flatten(1), expected, atol=1e-5, rtol=1e-4)
    plain = model.maps(features.layers)[feature]
    torch.testing.assert_close(seen[feature], torch.cat([plain, scores], dim=1))


def test_losses_by_hand():
    model = make(dense_cfg(DROPOUT=0.0))
    batch = inputs((64, 64))
    images = model.preprocess(batch)
    targets = model.targets(batch, images.padded_size)
    with torch.no_grad():
        losses = model.losses(images, targets, batch[0]["vocabulary"])
        logits, scores = model.logits_and_scores(images.tensor, batch[0]["vocabulary"])
    labels = torch.full((64, 64), -1)
    for class_id, mask in zip(reversed(targets[0].class_ids), targets[0].masks.flip(0), strict=True):
        labels[mask] = class_id
    for name, maps, weight in (("loss_sem_seg", logits, 1.0), ("loss_score", scores / 0.07, 0.4)):
        log_probs = F.interpolate(maps, size=(64, 64), mode="bilinear").log_softmax(1)[0]
        picked = log_probs.gather(0, labels.clamp(min=0)[None])[0][labels >= 0]
        torch.testing.assert_close(losses[name], -weight * picked.sum() / 64**2)


@pytest.mark.parametrize("clip", TOWERS)
@torch.no_grad()
def test_sliding_window(clip):
    cfg = dense_cfg(clip)
    plain = make(cfg)
    sliding = cfg.MODEL.OVSEG.TEST.SLIDING
    sliding.SIZE, sliding.STRIDE, sliding.BATCH = 64, 40, 3
    slid = make(cfg)
    one, large = inputs((64, 64), (90, 130))
    # A window that holds the image is the image; of a larger one each corner is seen by one window alone.
    torch.testing.assert_close(slid([one])[0]["sem_seg"], plain([one])[0]["sem_seg"], atol=1e-6, rtol=1e-4)
    crop = {**large, "image": large["image"][:, :64, :64], "height": 64, "width": 64}
    found, corner = slid([large])[0]["sem_seg"], plain([crop])[0]["sem_seg"]
    assert found.shape == (NUM_CLASSES, 90, 130)
    torch.testing.assert_close(found[:, :24, :24], corner[:, :24, :24], atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_windows_are_cut_from_the_image_without_its_padding():
    """As in mmsegmentation, on which the public DenseCLIP is built: 683 pixels have windows at 0 and 171, not 192."""
    cfg = dense_cfg()
    sliding = cfg.MODEL.OVSEG.TEST.SLIDING
    sliding.SIZE, sliding.STRIDE = 64, 40
    model = make(cfg)
    batch = inputs((90, 130), (40, 96))  # the second one is padded, but to no more than a window
    results = model(batch)
    for x, result, size in zip(batch, results, ((90, 130), (64, 96)), strict=True):
        image = model.preprocess([x]).tensor[..., : size[0], : size[1]]
        logits = model.sliding_window(lambda windows, x=x: model.pixel_logits(windows, x["vocabulary"]), image)
        expected = logits[0, :, : x["height"], : x["width"]].softmax(dim=0)
        torch.testing.assert_close(result["sem_seg"], expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(result["sem_seg"], model([x])[0]["sem_seg"], atol=1e-5, rtol=1e-4)


# Millions of parameters in the public table, where a ResNet's position table is that of 512 pixels: 207 rows more.
@pytest.mark.parametrize(
    ("config", "text", "million"),
    [("ade20k_RN50", False, 31.0), ("ade20k_RN101", True, 67.8 - 207 * 2048 / 1e6), ("ade20k_ViTB16", True, 105.3)],
)
def test_public_sizes(config, text, million):
    cfg = load_config(CONFIGS / f"{config}.yaml", ["MODEL.DEVICE", "meta", "MODEL.OVSEG.DENSE_CLIP.TEXT", str(text)])
    with torch.device("meta"):
        model = build_model(cfg)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count / 1e6 == pytest.approx(million, abs=0.05)


def test_a_long_name_is_refused():
    names = ("a very long name of a thing", *(f"class {i}" for i in range(4)))
    vocabulary = Vocabulary(names=names, is_thing=(True,) * 5)
    with pytest.raises(ValueError, match=r"'a very long name of a thing' has \d+ tokens .*TEXT_LENGTH 9 leaves 6"):
        make(dense_cfg())([{**inputs()[0], "vocabulary": vocabulary}])


def test_another_number_of_classes_is_refused():
    model = make(dense_cfg())
    with pytest.raises(ValueError, match="4 classes .*NUM_CLASSES is 5"):
        model([{**inputs()[0], "vocabulary": numbered_vocabulary(4, 2)}])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.OVSEG.TEST.TASKS", ["semantic", "panoptic"], r"TEST.TASKS .*expected \['semantic'\]"),
        ("MODEL.OVSEG.CLIP.NAME", "convnext_base", "DenseCLIP takes a ResNet or a ViT"),
        ("MODEL.OVSEG.SIZE_DIVISIBILITY", 16, "SIZE_DIVISIBILITY is 16; expected a multiple of 32"),
        ("MODEL.OVSEG.SIZE_DIVISIBILITY", 0, "SIZE_DIVISIBILITY is 0; expected a multiple of 32"),
        ("MODEL.OVSEG.TEST.SLIDING.SIZE", 48, "SLIDING.SIZE is 48; expected a multiple"),
        ("MODEL.CLIP_RESNET.NORM", "GN", "CLIP_RESNET.NORM"),
        ("MODEL.OVSEG.DENSE_CLIP.CONTEXT_LENGTH", 0, "DENSE_CLIP.CONTEXT_LENGTH is 0; expected at least 1"),
        ("MODEL.OVSEG.DENSE_CLIP.TEXT_LENGTH", 5, r"DENSE_CLIP.TEXT_LENGTH is 5; expected at least .*, 6"),
    ],
)
def test_wrong_options(key, value, message):
    cfg = dense_cfg()
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)
