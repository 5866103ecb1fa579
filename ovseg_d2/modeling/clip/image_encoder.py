"""What all CLIP image towers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from ovseg_d2.structures import ClipFeatures

#: Of CLIP's training images, RGB on the scale 0 to 255.
CLIP_PIXEL_MEAN = (122.7709383, 116.7460125, 104.09373615)
CLIP_PIXEL_STD = (68.5005327, 66.6321579, 70.32316305)


class ClipImageEncoder(nn.Module, ABC):
    """Runs the modules of an open_clip image tower on images of any size and keeps what lies between them.

    The tower stays whole under :attr:`tower`, so that weights have open_clip's names.
    """

    def __init__(self, tower: nn.Module, *, use_checkpoint: bool = False) -> None:
        """
        Args:
            tower: ``visual`` of an open_clip model.
            use_checkpoint: recompute activations in the backward pass.
        """
        super().__init__()
        self.tower = tower
        self.use_checkpoint = use_checkpoint

    def train(self, mode: bool = True) -> ClipImageEncoder:
        """As in PyTorch, but what is frozen stays as in evaluation: no stochastic depth, no moving statistics."""
        super().train(mode)
        for module in self.tower.modules():
            own = [parameter.requires_grad for parameter in module.parameters()]
            if own and not any(own):
                module.eval()
        return self

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """D, the dimension that images and texts share."""

    @abstractmethod
    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each of ``ClipFeatures.layers``."""

    @abstractmethod
    def forward(self, images: Tensor, *, masks_only: bool = False) -> ClipFeatures:
        """
        Args:
            images: (N, 3, H, W) normalised with :data:`CLIP_PIXEL_MEAN` and :data:`CLIP_PIXEL_STD`, of any size.
            masks_only: compute what :meth:`encode_masks` needs, and no more: ``image_embeds`` and ``dense`` are None,
                and of ``layers`` there are those that were passed on the way.
        """

    @abstractmethod
    def encode_masks(self, features: ClipFeatures, masks: Tensor, *, from_logits: bool = False) -> Tensor:
        """Embed regions.

        Args:
            features: of this encoder's :meth:`forward`.
            masks: (N, Q, H, W) on the frame of the images, at any resolution: in [0, 1], or logits. An empty mask
                gives an embedding without meaning, but a finite one.
            from_logits: whether ``masks`` are logits.

        Returns:
            (N, Q, D), not normalised.
        """


def check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse an unknown value of an option of an encoder.

    Raises:
        ValueError: ``value`` is not among ``allowed``.
    """
    if value not in allowed:
        raise ValueError(f"CLIP image encoder: {name} is {value!r}; expected one of {', '.join(allowed)}")
