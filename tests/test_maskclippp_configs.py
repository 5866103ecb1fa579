"""MaskCLIP++'s configurations have the numbers of the paper and of the public code."""

from pathlib import Path

import open_clip
import pytest

from ovseg_d2.engine.load_config import load_config
from ovseg_d2.modeling.clip.architectures import tower_kind

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "maskclippp"
#: File -> stride or patch, side of the training images, CLIP's size in evaluation, learning rate, factor of the image
#: tower.
TRAININGS = {
    "coco_panoptic_RN50x16": (32, 1024, 512, 2e-4, 1e-2),
    "coco_panoptic_ConvNeXtB": (32, 1024, 512, 2e-4, 1e-3),
    "coco_panoptic_ConvNeXtL": (32, 1024, 640, 1e-4, 1e-3),
    "coco_panoptic_ConvNeXtXXL": (32, 1024, 640, 1e-4, 1e-3),
    "coco_panoptic_EVAB16": (16, 512, 384, 2e-4, 1e-2),
    "coco_panoptic_EVAL14": (14, 448, 392, 2e-4, 1e-2),
    "coco_panoptic_EVAg14": (14, 448, 336, 2e-4, 1e-2),
    "coco_stuff_ConvNeXtB": (32, 1024, 512, 2e-4, 1e-3),
    "coco_stuff_EVAL14": (14, 448, 392, 2e-4, 1e-2),
}
MODELS = [path.stem for path in sorted(CONFIGS.glob("*.yaml")) if not path.name.startswith("Base-")]
#: gamma of equation 4; CLIP's exponent is what is left.
GAMMA = {"coco_stuff_ConvNeXtB": 0.4, "coco_stuff_EVAL14": 0.1}


@pytest.mark.parametrize("name", TRAININGS)
def test_trainings(name):
    cfg = load_config(CONFIGS / f"{name}.yaml")
    stride, size, clip_size, lr, factor = TRAININGS[name]
    ovseg, solver, options = cfg.MODEL.OVSEG, cfg.SOLVER, cfg.MODEL.OVSEG.MASKCLIPPP
    assert size // stride == 32
    assert size == (cfg.INPUT.CROP.SIZE[0] if "stuff" in name else cfg.INPUT.IMAGE_SIZE)
    assert (ovseg.CLIP.RESIZE, ovseg.CLIP.INPUT_SIZE) == ("short", clip_size)
    assert (solver.BASE_LR, solver.BASE_LR_END, solver.WEIGHT_DECAY) == (lr, 1e-5, 0.05)
    assert (solver.MAX_ITER, solver.IMS_PER_BATCH, solver.CLIP_GRADIENTS.CLIP_VALUE) == (20000, 4, 0.01)
    assert solver.LR_SCHEDULER_NAME == "WarmupCosineLR" and solver.WARMUP_ITERS == 0 and solver.AMP.ENABLED
    kind, factors = tower_kind(ovseg.CLIP.NAME), dict(solver.LR_FACTORS)
    assert factors.pop("clip.visual.tower") == factor
    assert factors == ({"clip.text": 1e-2} if name == "coco_stuff_EVAL14" else {})
    assert (ovseg.TEXT.TRAINABLE == "frozen") == (name != "coco_stuff_EVAL14")
    assert ovseg.CLIP.TRAINABLE == ("attention_in" if kind == "eva" else "full")
    assert (options.SIMILARITY == "pseudo_text") == (kind == "convnext") != options.IGNORE_EMPTY
    assert options.USE_LOGIT_SCALE == options.IGNORE_EMPTY
    assert ovseg.PROPOSALS.NAME == "GroundTruthProposals" and ovseg.TEST.TASKS == ["mask_accuracy"]


@pytest.mark.parametrize("name", MODELS)
def test_evaluations(name):
    """The generator changes, the CLIP that it serves does not."""
    cfg = load_config(CONFIGS / f"{name}.yaml")
    prop, ensemble = cfg.MODEL.OVSEG.PROPOSALS, cfg.MODEL.OVSEG.ENSEMBLE
    own = cfg.MODEL.OVSEG.CLIP
    for clip, tag in ((own.NAME, own.PRETRAINED), (prop.CLIP_NAME, prop.CLIP_PRETRAINED)):
        if clip:
            assert tag in open_clip.list_pretrained_tags_by_model(clip)
            # Weights that were trained with another activation load without a word.
            trained_with = open_clip.get_pretrained_cfg(clip, tag).get("quick_gelu", False)
            assert trained_with == open_clip.get_model_config(clip).get("quick_gelu", False)
    training = next((training for training in TRAININGS if name.startswith(training)), None)
    if training:
        trained = load_config(CONFIGS / f"{training}.yaml").MODEL.OVSEG
        for node in ("CLIP", "TEXT", "MASKCLIPPP"):
            assert cfg.MODEL.OVSEG[node] == trained[node]
    if prop.NAME == "GroundTruthProposals":
        assert "mask_accuracy" in cfg.MODEL.OVSEG.TEST.TASKS
    else:
        assert prop.TRAINABLE == "frozen" and prop.DATASET
        assert (prop.RESIZE, prop.INPUT_SIZE) == (("none", 0) if "SwinT" in name else ("short", 800))
    assert ensemble.NAME == ("maskclippp" if "_ens" in name else "none")
    if "_ens" in name and training in GAMMA:
        assert (ensemble.ALPHA, ensemble.BETA) == (pytest.approx(1 - GAMMA[training]), 1.0)
