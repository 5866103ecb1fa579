"""CLIP (arXiv 2103.00020): an image tower, a text tower and the scale of their cosine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ovseg_d2.modeling.clip.image_encoder import ClipImageEncoder
from ovseg_d2.modeling.clip.text_encoder import ClipTextEncoder

#: CLIP was trained with its scale kept below this.
MAX_LOGIT_SCALE = 100.0


class Clip(nn.Module):
    """Both towers; a state dict has ``visual.tower.*``, ``text.*`` and ``logit_scale``."""

    def __init__(
        self, *, visual: ClipImageEncoder | None, text: ClipTextEncoder | None, logit_scale: nn.Parameter
    ) -> None:
        """
        Args:
            visual: None where images have another backbone, or the image tower has become one.
            text: None where a model brings text embeddings of its own.
            logit_scale: scalar, the logarithm of the scale.
        """
        super().__init__()
        self.visual = visual
        self.text = text
        self.logit_scale = logit_scale

    @property
    def embed_dim(self) -> int:
        """D, the dimension that images and texts share."""
        return self.text.embed_dim if self.visual is None else self.visual.embed_dim

    def scale(self) -> Tensor:
        """The factor of cosine similarities, at most 100."""
        return torch.clamp(self.logit_scale.exp(), max=MAX_LOGIT_SCALE)
