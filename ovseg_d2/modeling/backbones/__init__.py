"""Backbones that detectron2 lacks, in its BACKBONE registry."""

from ovseg_d2.modeling.backbones import clip_resnet as _clip_resnet  # noqa: F401  (fills the registry)
from ovseg_d2.modeling.backbones import clip_vit_fpn as _clip_vit_fpn  # noqa: F401
from ovseg_d2.modeling.backbones import mix_transformer as _mix_transformer  # noqa: F401
from ovseg_d2.modeling.backbones import resnet_deep_stem as _resnet_deep_stem  # noqa: F401
from ovseg_d2.modeling.backbones import swin as _swin  # noqa: F401
from ovseg_d2.modeling.backbones import timm_vit_fpn as _timm_vit_fpn  # noqa: F401
