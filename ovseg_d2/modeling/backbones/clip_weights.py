"""The weights of backbones that are image towers of CLIP."""

from __future__ import annotations

from ovseg_d2.modeling.backbones.pretrained import PretrainedBackbone
from ovseg_d2.modeling.clip.build import load_image_pretrained
from ovseg_d2.modeling.clip.image_encoder import ClipImageEncoder

_TOWER = "encoder.tower."


class ClipWeights(PretrainedBackbone):
    """Has an ``encoder``, whose tower gets the weights ``pretrained`` of the model ``clip_name``."""

    weights_key = "MODEL.OVSEG.CLIP.PRETRAINED"
    encoder: ClipImageEncoder
    clip_name: str
    pretrained: str

    @property
    def weights_name(self) -> str:
        return self.pretrained

    def pretrained_names(self) -> list[str]:
        return [name for name in self.state_dict() if name.startswith(_TOWER)]

    def load_pretrained(self) -> str:
        return load_image_pretrained(self.encoder, self.clip_name, self.pretrained)
