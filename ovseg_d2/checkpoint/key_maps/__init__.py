"""Names in public checkpoints -> names here. The only place that knows the former; one file a family."""

from ovseg_d2.checkpoint.key_maps.backbones import SWIN, TORCHVISION_RESNET
from ovseg_d2.checkpoint.key_maps.base import KeyMap
from ovseg_d2.checkpoint.key_maps.catseg import CATSEG, FGASEG
from ovseg_d2.checkpoint.key_maps.frozen_clip import FREESEG, MAFT, OVSEG, PROMPTS, ZEGFORMER, ZSSEG
from ovseg_d2.checkpoint.key_maps.mask2former import FCCLIP, MAFT_PLUS, MASK2FORMER, MASKFORMER
from ovseg_d2.checkpoint.key_maps.maskclippp import MASKCLIPPP, MASKCLIPPP_EVA01, MASKCLIPPP_EVA02
from ovseg_d2.checkpoint.key_maps.zegclip import ZEGCLIP

# The first that recognises a file is taken: the names of the later ones are among those of the earlier, and more.
KEY_MAPS = (
    MASKCLIPPP_EVA01,
    MASKCLIPPP_EVA02,
    MASKCLIPPP,
    FGASEG,
    CATSEG,
    ZEGCLIP,
    MAFT_PLUS,
    FCCLIP,
    MAFT,
    FREESEG,
    ZEGFORMER,
    OVSEG,
    ZSSEG,
    PROMPTS,
    MASKFORMER,
    MASK2FORMER,
    TORCHVISION_RESNET,
    SWIN,
)

__all__ = ["KEY_MAPS", "MAFT_PLUS", "MASKCLIPPP", "KeyMap"]
