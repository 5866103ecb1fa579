"""Models and their parts; importing it fills detectron2's registries."""

from ovseg_d2.modeling import meta_arch as _meta_arch  # noqa: F401
