"""Models, in detectron2's META_ARCH registry."""

from ovseg_d2.modeling.meta_arch import dense_clip as _dense_clip  # noqa: F401  (fills the registry)
from ovseg_d2.modeling.meta_arch import fcclip as _fcclip  # noqa: F401
from ovseg_d2.modeling.meta_arch import fga_seg as _fga_seg  # noqa: F401
from ovseg_d2.modeling.meta_arch import frozen_clip as _frozen_clip  # noqa: F401
from ovseg_d2.modeling.meta_arch import ldvc as _ldvc  # noqa: F401
from ovseg_d2.modeling.meta_arch import maft as _maft  # noqa: F401
from ovseg_d2.modeling.meta_arch import maft_plus as _maft_plus  # noqa: F401
from ovseg_d2.modeling.meta_arch import mask2former as _mask2former  # noqa: F401
from ovseg_d2.modeling.meta_arch import maskclippp as _maskclippp  # noqa: F401
from ovseg_d2.modeling.meta_arch import mta_clip as _mta_clip  # noqa: F401
from ovseg_d2.modeling.meta_arch import prompt_tuning as _prompt_tuning  # noqa: F401
from ovseg_d2.modeling.meta_arch import training_free as _training_free  # noqa: F401
