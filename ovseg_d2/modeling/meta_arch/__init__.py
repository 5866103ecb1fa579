"""Models, in detectron2's META_ARCH registry."""

from ovseg_d2.modeling.meta_arch import mask2former as _mask2former  # noqa: F401  (fills the registry)
