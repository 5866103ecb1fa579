"""Every key that ovseg_d2 adds to detectron2's configuration, with its default and its meaning."""

from __future__ import annotations

from detectron2.config import CfgNode as CN

from ovseg_d2.config.backbones import add_backbones
from ovseg_d2.config.closed_vocabulary import add_closed_vocabulary
from ovseg_d2.config.common import add_clip_and_texts, add_losses_and_inference
from ovseg_d2.config.mask_classification import add_mask_classification
from ovseg_d2.config.pixel_classification import add_pixel_classification
from ovseg_d2.config.proposals import add_proposals
from ovseg_d2.config.run import add_checkpoint, add_input, add_solver


def add_ovseg_config(cfg: CN) -> None:
    """Add the project's keys to ``cfg`` (from ``detectron2.config.get_cfg()``), in place.

    A key that the installed detectron2 already has (its versions differ) keeps its meaning and gets our default.
    """
    ovseg = cfg.MODEL.OVSEG = CN()
    add_clip_and_texts(ovseg)
    add_proposals(ovseg)
    add_mask_classification(ovseg)
    add_closed_vocabulary(ovseg)
    add_pixel_classification(ovseg)
    add_losses_and_inference(ovseg)
    add_backbones(cfg.MODEL)
    add_input(cfg)
    add_solver(cfg.SOLVER)
    add_checkpoint(cfg)
