"""The recipes of MTA-CLIP have the paper's numbers, and each its baseline (section 4, Tables 1 to 3)."""

from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from ovseg_d2.data.vocabulary import vocabulary_from_metadata
from ovseg_d2.engine.load_config import load_config
from ovseg_d2.engine.optimizer import build_optimizer
from ovseg_d2.modeling.clip.build import clip_tokenizer
from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from ovseg_d2.modeling.clip.name_tokenizer import first_names

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "mta_clip"
IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
HALF = ((127.5,) * 3, (127.5,) * 3)
CLIP = (CLIP_PIXEL_MEAN, CLIP_PIXEL_STD)
# file: backbone, CLIP that gives the texts, mean and standard deviation of images
MODELS = {
    "ade20k_RN50": ("ClipResNetBackbone", "RN50-quickgelu", CLIP),
    "ade20k_RN101": ("ClipResNetBackbone", "RN101-quickgelu", CLIP),
    "ade20k_ViTB16": ("ClipViTFPN", "ViT-B-16-quickgelu", CLIP),
    "ade20k_ViTS": ("TimmViTFPN", "ViT-B-16-quickgelu", HALF),
    "ade20k_MiTB4": ("MixTransformer", "ViT-B-16-quickgelu", IMAGENET),
    "cityscapes_RN50": ("ClipResNetBackbone", "RN50-quickgelu", CLIP),
    "cityscapes_RN101": ("ClipResNetBackbone", "RN101-quickgelu", CLIP),
}
# classes, crop, batch, iterations, size in evaluation, sizes of several scales
SCHEDULES = {
    "ade20k": (150, [512, 512], 16, 160000, (512, 2048), list(range(256, 897, 128))),
    "cityscapes": (19, [1024, 1024], 8, 90000, (1024, 2048), list(range(512, 1793, 256))),
}


def test_all_files_are_listed():
    names = {path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("Base-")}
    assert names == {f"{prefix}{name}" for name in MODELS for prefix in ("", "baseline_")}


@pytest.mark.parametrize("prefix", ["", "baseline_"])
@pytest.mark.parametrize("name", MODELS)
def test_numbers(name, prefix):
    cfg = load_config(CONFIGS / f"{prefix}{name}.yaml")
    backbone, clip, (mean, std) = MODELS[name]
    assert cfg.MODEL.META_ARCHITECTURE == ("Mask2Former" if prefix else "MTACLIP")
    assert (cfg.MODEL.BACKBONE.NAME, cfg.MODEL.OVSEG.CLIP.NAME) == (backbone, clip)
    assert cfg.MODEL.OVSEG.CLIP.TRAINABLE == "full" and cfg.MODEL.WEIGHTS == ""
    assert (tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD)) == (mean, std)
    classes, crop, batch, iterations, size, scales = SCHEDULES[name.split("_")[0]]
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == classes
    assert (list(cfg.INPUT.CROP.SIZE), cfg.INPUT.MAX_SIZE_TRAIN) == (crop, 4 * crop[0])
    assert (cfg.INPUT.MIN_SIZE_TRAIN[0], cfg.INPUT.MIN_SIZE_TRAIN[-1]) == (crop[0] // 2, 2 * crop[0])
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == size
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.BASE_LR, solver.WEIGHT_DECAY) == (
        batch,
        iterations,
        2e-4,
        0.05,
    )
    assert solver.CLIP_GRADIENTS.CLIP_VALUE == 0.01 and solver.AMP.ENABLED
    assert cfg.MODEL.OVSEG.PROPOSALS.NUM_QUERIES == 100 and cfg.MODEL.OVSEG.PROPOSALS.DEC_LAYERS == 9
    assert list(cfg.TEST.AUG.MIN_SIZES) == scales and cfg.TEST.AUG.FLIP and not cfg.TEST.AUG.ENABLED
    mta = cfg.MODEL.OVSEG.MTA_CLIP
    assert (mta.NUM_CONTEXTS, mta.CONTEXT_LENGTH, mta.LOSS_WEIGHT, mta.NEGATIVES) == (3, 8, 1.0, "mix")


@pytest.mark.parametrize("name", ["ade20k_RN50", "cityscapes_RN50"])
def test_names_fit_beside_a_context(name):
    """Of ADE20K's classes 28 have several names in one text, of which the first counts."""
    cfg = load_config(CONFIGS / f"{name}.yaml")
    vocabulary = vocabulary_from_metadata(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]))
    mta, tokenizer = cfg.MODEL.OVSEG.MTA_CLIP, clip_tokenizer(cfg.MODEL.OVSEG.CLIP.NAME)
    room = mta.TEXT_LENGTH - mta.CONTEXT_LENGTH
    assert room == 5
    too_long = tokenizer(list(vocabulary.names)).argmax(dim=1) + 1 > room
    assert int(too_long.sum()) == (28 if name.startswith("ade20k") else 0)
    texts = [synonyms[0] for synonyms in first_names(vocabulary).synonyms]
    assert len(set(texts)) == len(vocabulary)
    assert int(tokenizer(texts).argmax(dim=1).max()) + 1 <= room


@pytest.mark.parametrize("name", ["ade20k_RN50", "ade20k_ViTS"])
def test_the_backbone_learns_ten_times_slower(name):
    cfg = load_config(CONFIGS / f"{name}.yaml", ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    backbone = {id(p) for p in model.proposals.backbone.parameters()}
    for group in build_optimizer(cfg, model).param_groups:
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(2e-5 if id(parameter) in backbone else 2e-4)
    assert not [name for name, p in model.clip.named_parameters() if p.requires_grad]
