"""Every key that ovseg_d2 adds to detectron2's configuration, with its default and its meaning."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode as CN


def add_ovseg_config(cfg: CN) -> None:
    """Add the project's keys to ``cfg`` (from ``detectron2.config.get_cfg()``), in place.

    A key that the installed detectron2 already has (its versions differ) keeps its meaning and gets our default.
    """
    _add_model(cfg.MODEL)
    _add_input(cfg)
    _add_solver(cfg.SOLVER)

    # Data sets of your own, registered before a run: mappings with `kind` (panoptic, instance or semantic) and the
    # arguments of `data.datasets.register_*`; relative paths start at DETECTRON2_DATASETS.
    cfg.DATASETS.REGISTER = []

    checkpoint = cfg.CHECKPOINT = CN()
    # Unpickling can run code, so detectron2's .pkl files are read only when this is True.
    checkpoint.ALLOW_PICKLE = False
    checkpoint.KEEP = 0  # how many of the newest periodic checkpoints stay on disk; 0: all


def _add_model(model: Any) -> None:
    ovseg = model.OVSEG = CN()
    # Images are padded so that height and width are multiples of this.
    ovseg.SIZE_DIVISIBILITY = 32

    # ---- mask proposals: which generator, and the sizes of the Mask2Former one (Mask2Former paper, section 3)
    prop = ovseg.PROPOSALS = CN()
    prop.NAME = "Mask2FormerProposals"  # a name in MASK_PROPOSAL_REGISTRY
    prop.WEIGHTS = ""  # checkpoint of the generator alone, loaded after MODEL.WEIGHTS
    prop.NUM_QUERIES = 100
    prop.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    prop.NUM_HEADS = 8
    # Pixel decoder: deformable encoder over ENC_FEATURES, then FPN up to COMMON_STRIDE.
    prop.ENC_FEATURES = ["res3", "res4", "res5"]
    prop.ENC_LAYERS = 6
    prop.ENC_FFN_DIM = 1024
    prop.ENC_DROPOUT = 0.0
    prop.COMMON_STRIDE = 4
    prop.NORM = "GN"
    prop.PIXEL_DIM = 256  # width of the pixel decoder
    prop.MASK_DIM = 256  # width of the per-pixel mask embedding
    # Masked-attention decoder.
    prop.HIDDEN_DIM = 256
    prop.DEC_LAYERS = 9  # real layers: the public Mask2Former configs count the prediction before the first one too
    prop.DEC_FFN_DIM = 2048
    prop.PRE_NORM = False
    prop.ENFORCE_INPUT_PROJ = False

    # ---- set criterion; CLASS, MASK and DICE weigh both the losses and the matching costs
    loss = ovseg.LOSS = CN()
    loss.CLASS = 2.0
    loss.MASK = 5.0
    loss.DICE = 5.0
    loss.NO_OBJECT = 0.1  # class weight of "no object"
    loss.NUM_POINTS = 12544
    loss.OVERSAMPLE = 3.0
    loss.IMPORTANCE = 0.75
    loss.DEEP_SUPERVISION = True

    # ---- inference
    test = ovseg.TEST = CN()
    test.TASKS = ["semantic"]  # any of semantic, panoptic, instance: what is computed and evaluated
    test.OBJECT_MASK_THRESHOLD = 0.8
    test.OVERLAP_THRESHOLD = 0.8
    # Resize mask logits to the output size before instead of after semantic inference. Always so for panoptic
    # and instance results; the public semantic-only configs resize the class scores afterwards.
    test.POSTPROCESS_BEFORE_INFERENCE = False
    # Tight boxes around instance masks. The public Mask2Former returns boxes of zeros (its box AP is 0).
    test.BOXES_FROM_MASKS = True

    # ---- Swin Transformer; the defaults are Swin-T (arXiv 2103.14030, section 3.3)
    swin = model.SWIN = CN()
    swin.EMBED_DIM = 96
    swin.DEPTHS = [2, 2, 6, 2]
    swin.NUM_HEADS = [3, 6, 12, 24]
    swin.WINDOW_SIZE = 7
    swin.DROP_PATH_RATE = 0.3
    swin.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    swin.USE_CHECKPOINT = False  # recompute activations in the backward pass: less memory, more time


def _add_input(cfg: CN) -> None:
    # Ground truth that the mapper gives: panoptic (a mask a segment), semantic (a mask a class) or instance.
    cfg.INPUT.TARGETS = "panoptic"
    # lsj: large-scale jitter and a square crop of IMAGE_SIZE; crop: shortest-edge choice, CROP and PAD_SIZE;
    # resize: shortest edge only.
    cfg.INPUT.PIPELINE = "lsj"
    cfg.INPUT.IMAGE_SIZE = 1024
    cfg.INPUT.MIN_SCALE = 0.1
    cfg.INPUT.MAX_SCALE = 2.0
    cfg.INPUT.COLOR_AUG_SSD = False
    cfg.INPUT.PAD_SIZE = -1  # the crop pipeline pads to exactly this square; -1: no padding
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # Segments that the crop removed wholly stay panoptic or instance targets, with an empty mask: so it is in all
    # public Mask2Former mappers but that of COCO instances.
    cfg.INPUT.KEEP_EMPTY_MASKS = True

    # An image that cannot be decoded: "skip" (logged with its path, another image takes its place, counted) or "raise".
    cfg.DATALOADER.ON_CORRUPT_IMAGE = "skip"
    cfg.TEST.ON_CORRUPT_IMAGE = "raise"


def _add_solver(solver: Any) -> None:
    solver.OPTIMIZER = "ADAMW"  # ADAMW or SGD
    # [module path, factor]: learning rate factors; the longest matching path wins.
    solver.LR_FACTORS = [["proposals.backbone", 0.1]]
    solver.WEIGHT_DECAY_NORM = 0.0
    solver.WEIGHT_DECAY_EMBED = 0.0
    solver.POLY_LR_POWER = 0.9
    solver.POLY_LR_CONSTANT_ENDING = 0.0
    solver.AMP.DTYPE = "bfloat16"  # bfloat16 or float16; CPU has bfloat16 only
    solver.CLIP_GRADIENTS.CLIP_TYPE = "full_model"  # one L2 norm over all gradients; also detectron2's value and norm
