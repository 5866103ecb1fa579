"""Backbones that detectron2 lacks, in its BACKBONE registry."""

from ovseg_d2.modeling.backbones import swin as _swin  # noqa: F401  (fills the registry)
