"""Keys of what surrounds a model: input and datasets, the solver, checkpoints."""

from __future__ import annotations

from detectron2.config import CfgNode as CN


def add_input(cfg: CN) -> None:
    """Add to ``INPUT``, ``DATASETS``, ``DATALOADER`` and ``TEST``."""
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

    # Share of the training images, in (0, 1], drawn at random by SEED; a smaller one is part of a larger one
    # (MaskCLIP++, Table 9).
    cfg.DATALOADER.TRAIN_FRACTION = 1.0

    # An image that cannot be decoded: "skip" (logged with its path, another image takes its place, counted) or "raise".
    cfg.DATALOADER.ON_CORRUPT_IMAGE = "skip"
    cfg.TEST.ON_CORRUPT_IMAGE = "raise"
    # detectron2's TEST.AUG: with ENABLED, --eval-only adds semantic results of several sizes and mirrored, sem_seg_TTA.

    # Data sets of your own, registered before a run: mappings with `kind` (panoptic, instance, semantic or zero_shot)
    # and the arguments of `data.datasets.register_*`; relative paths start at DETECTRON2_DATASETS.
    cfg.DATASETS.REGISTER = []
    # [dataset, file]: synonyms of its classes, a line a class. Public numbers of FC-CLIP, MAFT+ and MaskCLIP++ are made
    # with such lists (their *_with_prompt_eng.txt, which can be used as they are).
    cfg.DATASETS.CLASS_TEXTS = []


def add_solver(solver: CN) -> None:
    """Add to ``SOLVER``."""
    solver.OPTIMIZER = "ADAMW"  # ADAMW or SGD
    # [module path, factor]: learning rate factors; the longest matching path wins.
    solver.LR_FACTORS = [["proposals.backbone", 0.1]]
    solver.WEIGHT_DECAY_NORM = 0.0
    solver.WEIGHT_DECAY_EMBED = 0.0
    # WarmupCosineLR, WarmupPolyLR: where the learning rate BASE_LR ends; other groups end lower by their factors.
    solver.BASE_LR_END = 0.0
    solver.POLY_LR_POWER = 0.9
    solver.POLY_LR_CONSTANT_ENDING = 0.0
    # bfloat16, or float16 with a scaler of the loss, as in the public Mask2Former and its kin; CPU has bfloat16 only.
    solver.AMP.DTYPE = "bfloat16"
    solver.CLIP_GRADIENTS.CLIP_TYPE = "full_model"  # one L2 norm over all gradients; also detectron2's value and norm


def add_checkpoint(cfg: CN) -> None:
    """Add ``CHECKPOINT``."""
    checkpoint = cfg.CHECKPOINT = CN()
    # Unpickling can run code, so detectron2's .pkl files are read only when this is True.
    checkpoint.ALLOW_PICKLE = False
    checkpoint.KEEP = 0  # how many of the newest periodic checkpoints stay on disk; 0: all
