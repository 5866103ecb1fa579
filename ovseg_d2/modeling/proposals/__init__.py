"""Mask generators, and the registry that names them."""

from ovseg_d2.modeling.proposals import fcclip as _fcclip  # noqa: F401  (fills the registry)
from ovseg_d2.modeling.proposals import freeseg as _freeseg  # noqa: F401
from ovseg_d2.modeling.proposals import ground_truth as _ground_truth  # noqa: F401
from ovseg_d2.modeling.proposals import mask2former as _mask2former  # noqa: F401
from ovseg_d2.modeling.proposals import maskformer as _maskformer  # noqa: F401
from ovseg_d2.modeling.proposals import precomputed as _precomputed  # noqa: F401
from ovseg_d2.modeling.proposals import sam as _sam  # noqa: F401
from ovseg_d2.modeling.proposals.build import MASK_PROPOSAL_REGISTRY, build_mask_proposals, has_classes

__all__ = ["MASK_PROPOSAL_REGISTRY", "build_mask_proposals", "has_classes"]
