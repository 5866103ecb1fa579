"""The recipes of LDVC and ZegCLIP have the papers' numbers and those of ZegCLIP's public code."""

from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from ovseg_d2.data.vocabulary import vocabulary_from_metadata
from ovseg_d2.engine.load_config import load_config
from ovseg_d2.modeling.meta_arch.ldvc import LDVC

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# file: setting, classes in training and in evaluation, iterations, visual prompts of LDVC and of ZegCLIP
RECIPES = {
    "coco_156_ViTB16": ("inductive", 156, 171, 80000, 100, 100),
    "coco_156_ViTB16_st": ("transductive", 171, 171, 40000, 100, 100),
    "coco_171_ViTB16": ("supervised", 171, 171, 80000, 100, 100),
    "voc_15_ViTB16": ("inductive", 15, 20, 20000, 40, 10),
    "voc_15_ViTB16_st": ("transductive", 20, 20, 10000, 40, 10),
    "voc_20_ViTB16": ("supervised", 20, 20, 20000, 40, 10),
}


def test_all_files_are_listed():
    for folder in ("ldvc", "zegclip"):
        names = {path.stem for path in (CONFIGS / folder).glob("*.yaml") if not path.stem.startswith("Base-")}
        assert names == set(RECIPES)


@pytest.mark.parametrize("folder", ["ldvc", "zegclip"])
@pytest.mark.parametrize("name", RECIPES)
def test_numbers(folder, name):
    cfg = load_config(CONFIGS / folder / f"{name}.yaml")
    setting, trained, tested, iterations, ldvc_prompts, zegclip_prompts = RECIPES[name]
    is_ldvc = folder == "ldvc"
    options, solver = cfg.MODEL.OVSEG.LDVC, cfg.SOLVER
    assert cfg.MODEL.META_ARCHITECTURE == ("LDVC" if is_ldvc else "ZegCLIP")
    assert (options.SETTING, options.VISUAL_PROMPTS) == (setting, ldvc_prompts if is_ldvc else zegclip_prompts)
    assert options.TEXT_PROMPTS == (6 if is_ldvc else 0)
    assert (options.FOCAL_WEIGHT, options.DICE_WEIGHT) == (100, 1)
    assert cfg.MODEL.OVSEG.TEXT.TEMPLATES == (["zegclip"] if name.startswith("coco") else ["zegclip_voc"])
    vocabularies = [vocabulary_from_metadata(MetadataCatalog.get(d)) for d in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]
    assert [len(v) for v in vocabularies] == [trained, tested] and cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == trained
    assert sum(vocabularies[1].is_seen) == (156 if tested == 171 else 15)
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.WARMUP_ITERS) == (16, iterations, 1500)
    assert (solver.BASE_LR, solver.BASE_LR_END, solver.POLY_LR_POWER) == (2e-4, 1e-6, 0.9)
    assert {solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM, solver.WEIGHT_DECAY_EMBED} == {0.01}
    assert not solver.CLIP_GRADIENTS.ENABLED and not solver.AMP.ENABLED and solver.LR_FACTORS == []
    assert (tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD)) == (
        (123.675, 116.28, 103.53),
        (58.395, 57.12, 57.375),
    )
    sliding = cfg.MODEL.OVSEG.TEST.SLIDING
    assert (sliding.SIZE, sliding.STRIDE, cfg.INPUT.MIN_SIZE_TEST, list(cfg.INPUT.CROP.SIZE)) == (
        *(512, 426, 512),
        [512, 512],
    )
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING) == ((256, 1024), "range")
    assert cfg.MODEL.OVSEG.ENSEMBLE.CALIBRATE == 0.1  # which only the inductive setting applies


@pytest.mark.parametrize("folder", ["ldvc", "zegclip"])
@pytest.mark.parametrize("name", ["coco_156_ViTB16", "voc_15_ViTB16"])
def test_self_training_starts_halfway(folder, name):
    first, second = (load_config(CONFIGS / folder / f"{name}{suffix}.yaml") for suffix in ("", "_st"))
    half = first.SOLVER.MAX_ITER // 2
    assert half % first.SOLVER.CHECKPOINT_PERIOD == 0 and second.SOLVER.MAX_ITER == half
    assert second.MODEL.WEIGHTS == f"{first.OUTPUT_DIR}/model_{half - 1:07d}.pth"
    assert second.OUTPUT_DIR == f"{first.OUTPUT_DIR}_st"


def trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def test_trained_parameters():
    """11.27 million for COCO-Stuff; the paper says 11."""
    cfg = load_config(CONFIGS / "ldvc" / "coco_156_ViTB16.yaml", ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model: LDVC = build_model(cfg)
    prompts = model.clip.visual.prompts
    assert prompts.embeddings.numel() == 12 * 100 * 768 == 921_600
    assert trained(prompts.proj) + trained(prompts.last_norm) == 592_128
    assert trained(model.text_prompts) == 12 * 6 * 512 == 36_864
    assert trained(model.text_adapter) == 524_800
    assert [trained(block) for block in model.decoder.blocks] == [4_598_784] * 2
    assert trained(model) == 11_272_960
