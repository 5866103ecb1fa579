"""SAM as a mask generator: transformers' own pipeline finds the same masks, images without masks, names and folders."""

import json

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from transformers import MaskGenerationPipeline

from ovseg_d2.engine.loading import load_parts
from ovseg_d2.modeling.proposals.sam import SAMProposals
from ovseg_d2.modeling.proposals.sam_model import PUBLIC, build_sam
from ovseg_d2.structures import ImageBatch
from tests.modeling.tiny_hosts import COLOURS, host_cfg, host_inputs, maft_cfg, random_host
from tests.modeling.tiny_sam import tiny_sam, write_tiny_sam

MEAN, STD = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]
#: Of random weights nearly all masks are bad: no threshold.
ANY = {"points_per_side": 4, "points_per_batch": 5, "pred_iou_threshold": -1e9, "stability_threshold": 0.0}


def generator(**options) -> SAMProposals:
    return SAMProposals(sam=tiny_sam(), pixel_mean=MEAN, pixel_std=STD, **{**ANY, "nms_threshold": 0.9, **options})


def picture(size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def batch(*sizes: tuple[int, int], bgr: bool = False) -> ImageBatch:
    """Normalised random pictures, padded to 64 x 64."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    images = torch.zeros(len(sizes), 3, 64, 64)
    for seed, (image, (height, width)) in enumerate(zip(images, sizes, strict=True)):
        channels = picture((height, width), seed).flip(0) if bgr else picture((height, width), seed)
        image[:, :height, :width] = (channels - mean) / std
    return ImageBatch(images, list(sizes), list(range(len(sizes))))


@pytest.mark.parametrize(
    ("size", "options", "least"),
    [
        ((50, 37), {}, 3),
        ((64, 64), {"stability_threshold": 0.3, "stability_offset": 0.5, "nms_threshold": 1.0}, 3),
        ((64, 64), {"pred_iou_threshold": 0.1}, 1),
        ((33, 90), {"crop_layers": 1, "nms_threshold": 0.7}, 3),
    ],
)
def test_as_the_pipeline_of_transformers(size, options, least):
    ours = generator(**options)
    pipeline = MaskGenerationPipeline(model=ours.sam, image_processor=ours.processor)
    expected = pipeline(
        Image.fromarray(picture(size).permute(1, 2, 0).numpy()),
        points_per_batch=ours.points_per_batch,
        points_per_crop=ours.points_per_side,
        crops_n_layers=ours.crop_layers,
        pred_iou_thresh=ours.pred_iou_threshold,
        stability_score_thresh=ours.stability_threshold,
        stability_score_offset=ours.stability_offset,
        crops_nms_thresh=ours.nms_threshold,
    )["masks"]
    expected = np.stack([np.asarray(mask) for mask in expected])
    found = ours.generate(picture(size)).numpy()
    assert len(found) >= least and len(np.unique(found.mean(axis=(1, 2)))) >= least
    np.testing.assert_array_equal(found, expected[expected.any(axis=(1, 2))])


@pytest.mark.parametrize("bgr", [False, True])
def test_a_batch_of_odd_sizes(bgr):
    sizes = [(50, 37), (33, 61)]
    images = batch(*sizes, bgr=bgr)
    ours = generator(bgr=bgr)
    found = ours(images)
    assert found.mask_logits.shape[2:] == (64, 64) and found.class_logits is None
    for row, size in enumerate(sizes):
        # The same masks as of the picture alone, then what is left over, then rows that fill the batch.
        masks = ours.generate(picture(size, row).float())
        inside = found.mask_logits[row, :, : size[0], : size[1]] > 0
        assert (inside[: len(masks)] != masks).float().mean() < 1e-3
        assert inside[len(masks)].equal(~masks.any(dim=0))
        assert not inside[len(masks) + 1 :].any() and not found.valid[row, len(masks) + 1 :].any()
        assert found.valid[row, : len(masks)].all() and found.valid[row].sum() == len(masks) + (~masks.any(0)).any()
        assert (found.mask_logits[row] > 0).sum() == inside.sum()  # none in the padding


def test_no_mask_at_all():
    images = batch((50, 37), (33, 61))
    nothing = generator(pred_iou_threshold=1e9, residual_mask=False)(images)
    assert nothing.mask_logits.shape == (2, 1, 64, 64) and not nothing.valid.any()
    assert not (nothing.mask_logits > 0).any()
    # Each threshold alone can do it.
    assert len(generator(stability_threshold=1.5).generate(picture((50, 37)))) == 0
    assert len(generator(min_area=64 * 64).generate(picture((50, 37)))) == 0
    rest = generator(pred_iou_threshold=1e9)(images)
    assert rest.valid.all() and [(m > 0).sum().item() for m in rest.mask_logits] == [50 * 37, 33 * 61]


def test_small_masks_are_dropped():
    areas = generator().generate(picture((50, 37))).sum(dim=(1, 2)).tolist()
    least = sorted(areas)[1]
    found = generator(min_area=least).generate(picture((50, 37))).sum(dim=(1, 2)).tolist()
    assert found == [area for area in areas if area >= least] and len(found) < len(areas)


def test_frozen_for_good():
    ours = generator().train()
    assert not ours.sam.training and not any(p.requires_grad for p in ours.parameters())
    images = batch((50, 37))
    images.tensor.requires_grad_(True)
    assert not ours(images).mask_logits.requires_grad


@pytest.mark.parametrize(("name", "million"), [("base", 93.7), ("large", 312.3), ("huge", 641.1)])
def test_public_models_need_no_file(name, million):
    with torch.device("meta"):
        sam = build_sam(f"facebook/sam-vit-{name}")
    assert sum(parameter.numel() for parameter in sam.parameters()) / 1e6 == pytest.approx(million, abs=0.05)
    assert f"facebook/sam-vit-{name}" in PUBLIC


def sam_cfg(cfg, folder: str):
    prop = cfg.MODEL.OVSEG.PROPOSALS
    prop.NAME, prop.CLASS_HEAD = "SAMProposals", "none"
    prop.SAM.NAME = folder
    prop.SAM.POINTS_PER_SIDE, prop.SAM.PRED_IOU_THRESHOLD, prop.SAM.STABILITY_THRESHOLD = 3, -1e9, 0.0
    prop.SAM.NMS_THRESHOLD = 0.9
    cfg.MODEL.OVSEG.CLIP.PRETRAINED = "ovshapes"
    cfg.MODEL.OVSEG.ENSEMBLE.NAME = "none"
    return cfg


def test_names_and_folders(tmp_path):
    folder = tmp_path / "sam"
    with pytest.raises(FileNotFoundError, match=r"PROPOSALS.SAM.NAME: .*config.json does not exist; expected a folder"):
        build_sam(str(folder))
    write_tiny_sam(folder, weights=False)
    (tmp_path / "other").mkdir()
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "sam2"}))
    with pytest.raises(ValueError, match=r"other/config.json is of a model of type 'sam2'; expected 'sam'"):
        build_sam(str(tmp_path / "other"))
    (tmp_path / "other" / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"other/config.json is not a JSON object"):
        build_sam(str(tmp_path / "other"))
    cfg = sam_cfg(host_cfg("SAMProposals"), str(folder))
    with pytest.raises(ValueError, match=r"SAM.NAME: cannot read the weights of .*sam: [^\n]*$"):
        load_parts(build_model(cfg), cfg, strict=True)


def test_transformers_is_an_extra(monkeypatch):
    monkeypatch.setattr("ovseg_d2.modeling.layers.hub_model.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'SAMProposals', which needs transformers: pip install 'ovseg_d2\[sam\]'"):
        build_sam("facebook/sam-vit-base")


@pytest.mark.parametrize("key", ["POINTS_PER_SIDE", "POINTS_PER_BATCH"])
def test_bad_numbers(key):
    with pytest.raises(ValueError, match=rf"PROPOSALS.SAM.{key} is 0; expected at least 1"):
        generator(**{key.lower(): 0})


def test_weights_are_read_after_building(tmp_path):
    folder = write_tiny_sam(tmp_path / "sam")
    expected = tiny_sam().state_dict()
    cfg = sam_cfg(host_cfg("SAMProposals"), folder)
    model = build_model(cfg)
    assert not all(tensor.equal(expected[name]) for name, tensor in model.proposals.sam.state_dict().items())
    load_parts(model, cfg, strict=True)
    found = model.proposals.sam.state_dict()
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)

    # A checkpoint of the whole model needs no folder of weights.
    torch.save(model.state_dict(), tmp_path / "model.pth")
    for file in (tmp_path / "sam").glob("*.safetensors"):
        file.unlink()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    again = build_model(cfg)
    load_parts(again, cfg, strict=True)
    assert all(tensor.equal(expected[name]) for name, tensor in again.proposals.sam.state_dict().items())


@pytest.mark.parametrize("make", [host_cfg, maft_cfg])
def test_in_a_model(make, tmp_path):
    """Two images with different numbers of masks: batch equals single, for crops and for mask tokens."""
    model = random_host(sam_cfg(make("PrecomputedProposals"), write_tiny_sam(tmp_path)))
    model.proposals.sam.load_state_dict(tiny_sam().state_dict())
    inputs = [x | {"vocabulary": COLOURS} for x in host_inputs((64, 64), (64, 64))]
    with torch.no_grad():
        both = model.eval()(inputs)
        for x, result in zip(inputs, both, strict=True):
            torch.testing.assert_close(result["sem_seg"], model([x])[0]["sem_seg"], rtol=1e-4, atol=1e-5)
            assert result["sem_seg"].sum() > 0
