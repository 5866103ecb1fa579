"""Prompts that learn from ground-truth masks, on the tiny ViT CLIP with random weights."""

import math

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch.nn import functional as F

from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from ovseg_d2.modeling.layers.boxes import bounding_boxes
from ovseg_d2.modeling.meta_arch.prompt_tuning import random_boxes
from tests.helpers import numbered_vocabulary, random_input, randomise, tiny_cfg

SIZES = [(48, 72), (56, 41)]


def prompt_cfg(kind: str = "zsseg", depth: int = 0) -> CfgNode:
    cfg = tiny_cfg(tasks=["semantic"])
    cfg.MODEL.META_ARCHITECTURE = "PromptTuning"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [100.0, 110.0, 120.0], [50.0, 55.0, 60.0]
    cfg.INPUT.FORMAT = "RGB"
    cfg.SEED = 3
    ovseg = cfg.MODEL.OVSEG
    ovseg.CLIP.NAME = "OVShapes-ViT"
    ovseg.TEXT.TEMPLATES = ["single", "vild"] if kind == "none" else ["name"]
    ovseg.PROMPTS.KIND = kind
    ovseg.PROMPTS.PREFIX, ovseg.PROMPTS.TASK, ovseg.PROMPTS.TASKS = 3, 2, ["all.", "things.", "stuff."]
    ovseg.CROPS.SIZE = 16
    ovseg.CROPS.MASK_PROMPTS = depth
    return cfg


def make(cfg: CfgNode) -> torch.nn.Module:
    model = randomise(build_model(cfg))
    with torch.no_grad():
        model.clip.logit_scale.fill_(2.0)
    return model.train()


def inputs(num_classes: int = 5, num_masks: int = 3) -> list[dict]:
    """Two images with L-shaped masks: a crop's patches are not all inside."""
    batch = [random_input(size, num_classes=num_classes, num_masks=num_masks, seed=i) for i, size in enumerate(SIZES)]
    for x in batch:
        masks = x["instances"].gt_masks.tensor
        for mask, (x0, y0, x1, y1) in zip(masks, bounding_boxes(masks).int().tolist(), strict=True):
            mask[(y0 + y1) // 2 : y1, (x0 + x1) // 2 : x1] = False
    return batch


VARIANTS = [("zsseg", 0), ("freeseg", 0), ("none", 2), ("freeseg", 2)]


@pytest.mark.parametrize(("kind", "depth"), VARIANTS)
def test_training_moves_the_prompts_alone(kind, depth):
    torch.manual_seed(0)
    model = make(prompt_cfg(kind, depth))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {"zsseg": {"prompts.prefix_prompt"}, "none": set()}.get(
        kind, {"prompts.prefix_prompt", "prompts.task_prompt"}
    )
    assert trained == expected | ({"mask_prompts.embeddings"} if depth else set())
    assert not model.clip.training and model.text_classifier.training
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.sampler.start = lambda ids, device: lambda counts, num: torch.full((sum(counts), num, 2), 0.7)
    values = []
    for _ in range(6):
        losses = model(inputs())
        assert set(losses) == {"loss_prompts"} and losses["loss_prompts"].requires_grad
        optimizer.zero_grad()
        losses["loss_prompts"].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
        values.append(float(losses["loss_prompts"].detach()))
    assert values[-1] < values[0] - 3e-4


@pytest.mark.parametrize(("kind", "depth"), VARIANTS)
def test_images_without_targets(kind, depth):
    model = make(prompt_cfg(kind, depth))
    empty = inputs(num_masks=0)
    # A mask that the crop has emptied is no target either.
    gone = inputs(num_masks=1)
    gone[0]["instances"].gt_masks.tensor.zero_()
    gone[1]["instances"].gt_masks.tensor.zero_()
    for batch in (empty, gone):
        model.zero_grad()
        loss = model(batch)["loss_prompts"]
        assert loss.item() == 0.0
        loss.backward()
        assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)
    mixed = [*inputs()[:1], empty[1]]
    model.sampler.seed, model.sampler.step = 0, lambda: 0
    torch.testing.assert_close(model(mixed)["loss_prompts"], model(mixed[:1])["loss_prompts"])


@pytest.mark.parametrize(("kind", "depth"), VARIANTS)
def test_a_batch_is_the_mean_of_its_masks(kind, depth):
    model = make(prompt_cfg(kind, depth))
    model.sampler.step = lambda: 7
    batch = inputs()
    vocabulary = batch[0]["vocabulary"]
    batch[1] = {**random_input(SIZES[1], num_classes=5, num_masks=5, seed=1), "vocabulary": vocabulary}
    together = model(batch)["loss_prompts"]
    alone = [model([x])["loss_prompts"] for x in batch]
    torch.testing.assert_close(together, (3 * alone[0] + 5 * alone[1]) / 8, rtol=1e-4, atol=1e-5)
    assert (alone[0] - alone[1]).abs() > 1e-4


def test_one_class_has_nothing_to_tell_apart():
    model = make(prompt_cfg())
    loss = model(inputs(num_classes=1))["loss_prompts"]
    loss.backward()
    assert loss.item() == 0.0 and not model.prompts.prefix_prompt.grad.any()


@pytest.mark.parametrize("depth", [0, 2])
def test_the_loss_by_hand(depth):
    """Whole boxes, no flips: crops one by one through torch, texts one by one."""
    model = make(prompt_cfg("freeseg", depth))
    model.crop_area = (1.0, 1.0)
    # An aspect of 1, so that only square boxes are whole; no flip.
    draws = torch.tensor([[0.5, 0.5], [0.5, 0.0], [0.0, 0.9]])
    model.sampler.start = lambda ids, device: lambda counts, num: draws.expand(sum(counts), -1, -1)
    x = random_input((40, 40), num_classes=5, num_masks=2)
    mask = x["instances"].gt_masks.tensor
    mask.zero_()
    mask[0, 4:25, 7:28] = True
    mask[0, 10, 10] = False
    mask[1, 0:10, 30:40] = True
    found = model([x])["loss_prompts"]

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_PIXEL_MEAN, CLIP_PIXEL_STD))
    image = (x["image"] - mean) / std
    expected = []
    for mask_index, (y, x0, side) in enumerate([(4, 7, 21), (0, 30, 10)]):
        window = (..., slice(y, y + side), slice(x0, x0 + side))
        piece, shown = (image * mask[mask_index])[window], mask[mask_index][window].float()
        crop = F.interpolate(piece[None], size=(16, 16), mode="bicubic", align_corners=False)
        prompts = None
        if depth:
            prompts = model.mask_prompts(F.interpolate(shown[None, None], size=(16, 16), mode="nearest")[0], 8)
        embed = F.normalize(model.clip.visual(crop, prompts=prompts).image_embeds, dim=-1)[0]
        tokenizer = model.text_classifier.tokenizer
        for task in range(3):
            texts = [model.prompts(model.clip.text, tokenizer([name]))[task, 0] for name in x["vocabulary"].names]
            logits = F.normalize(torch.stack(texts), dim=-1) @ embed * math.exp(2.0)
            expected.append(F.cross_entropy(logits, x["instances"].gt_classes[mask_index]))
    torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=1e-4, atol=1e-4)


def test_a_limited_number_of_masks_drawn_at_random():
    model = make(prompt_cfg())
    model.masks_per_image = 2
    batch = inputs(num_masks=6)
    images = model.preprocess(batch)
    targets = model.targets(batch, images.padded_size)
    targets[0].class_ids.copy_(torch.arange(6))
    targets[0].masks[3] = False
    seen = set()
    for _ in range(12):
        embeds, class_ids = model.target_embeds(images, targets)
        assert len(embeds) == len(class_ids) == 4
        seen |= set(class_ids[:2].tolist())
    assert seen == {0, 1, 2, 4, 5}


def test_random_boxes_stay_inside_and_show_the_mask():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(400, 4, generator=generator)
    draws[0], draws[1] = 0.0, 1 - 2**-24
    masks = torch.zeros(400, 20, 30, dtype=torch.bool)
    masks[:, 3:17, 5:25] = True
    boxes = torch.tensor([5.0, 3, 25, 17]).expand(400, 4)
    found = random_boxes(boxes, masks, draws, area=(0.1, 0.5))
    assert found.equal(found.round())
    assert (found[:, :2] >= boxes[:, :2]).all() and (found[:, 2:] <= boxes[:, 2:]).all()
    sides = found[:, 2:] - found[:, :2]
    share = sides.prod(dim=1) / 280
    assert share.min() > 0.07 and share.max() < 0.55 and share.std() > 0.08
    aspect = sides[:, 0] / sides[:, 1]
    assert aspect.min() > 0.6 and aspect.max() < 1.7
    # Wherever they could, they have been.
    assert found[:, 0].min() == 5 and found[:, 2].max() == 25 and found[:, 1].min() == 3 and found[:, 3].max() == 17

    # Two far pixels: most draws show neither, and the whole box takes their place.
    masks = torch.zeros(400, 20, 30, dtype=torch.bool)
    masks[:, 3, 5] = masks[:, 16, 24] = True
    found = random_boxes(boxes, masks, draws, area=(0.1, 0.2))
    whole = (found == boxes).all(dim=1)
    assert 0.8 < whole.float().mean() < 1
    for box, mask in zip(found[~whole].int().tolist(), masks, strict=False):
        assert mask[box[1] : box[3], box[0] : box[2]].any()


def test_what_is_refused():
    with pytest.raises(ValueError, match="nothing to train: MODEL.OVSEG.PROMPTS.KIND is 'none'"):
        build_model(prompt_cfg("none"))
    cfg = prompt_cfg()
    cfg.MODEL.OVSEG.CROPS.STYLE = "crop"
    with pytest.raises(ValueError, match="expected MODEL.OVSEG.CROPS.STYLE 'mask_crop'"):
        build_model(cfg)
    for key, value in (("MASKS_PER_IMAGE", 0), ("CROP_AREA", [0.5, 0.1]), ("CROP_AREA", [0.0, 1.0])):
        cfg = prompt_cfg()
        cfg.MODEL.OVSEG.PROMPTS[key] = value
        with pytest.raises(ValueError, match=f"MODEL.OVSEG.PROMPTS.{key} is"):
            build_model(cfg)
    with pytest.raises(ValueError, match="evaluate a FrozenCLIP with MODEL.OVSEG.PROMPTS.WEIGHTS"):
        make(prompt_cfg()).eval()(inputs())


def test_texts_of_the_regions_are_trained():
    cfg = prompt_cfg()
    cfg.MODEL.OVSEG.TEXT.TEMPLATES = ["single"]
    cfg.MODEL.OVSEG.FROZEN_CLIP.REGION_TEMPLATES = ["name"]
    cfg.MODEL.OVSEG.FROZEN_CLIP.QUERY_PROMPTS = False
    model, plain = make(cfg), make(prompt_cfg())
    vocabulary = numbered_vocabulary(3, 2)
    texts = [m.task_texts(vocabulary)[0].embeds for m in (model, plain)]
    torch.testing.assert_close(*texts)
