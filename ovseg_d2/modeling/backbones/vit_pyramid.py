"""The feature pyramid that makes four strides of a plain vision transformer's one (DenseCLIP, arXiv 2112.01518).

Modules are named as in DenseCLIP's checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detectron2.layers import ShapeSpec, get_norm
from torch import Tensor, nn

from ovseg_d2.modeling.backbones.pretrained import PretrainedBackbone

NAMES = ("res2", "res3", "res4", "res5")


class Pyramid(nn.Module):
    """Maps ``res2`` to ``res5``, with 16 x 16 patches of strides 4 to 32, all of the transformer's width."""

    #: The config key that names the blocks, for messages.
    blocks_key = "MODEL.CLIP_VIT_FPN.OUT_BLOCKS"

    def __init__(self, *, width: int, patch_size: int, layers: Sequence[str], norm: str) -> None:
        """
        Args:
            width, patch_size: of the transformer.
            layers: names of its four maps, from that for the finest to that for the coarsest output.
            norm: detectron2's name of the normalisation within the head of ``res2``.

        Raises:
            ValueError: another number of ``layers``.
        """
        super().__init__()
        if len(layers) != len(NAMES):
            raise ValueError(
                f"{self.blocks_key}: {len(layers)} blocks ({', '.join(layers) or 'none'}); expected {len(NAMES)}"
            )
        self.layers = tuple(layers)
        self.width = width
        self.patch_size = patch_size
        self.fpn1 = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.ConvTranspose2d(width, width, kernel_size=2, stride=2),
            get_norm(norm, width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, kernel_size=2, stride=2),
        )
        self.fpn2 = nn.Sequential(nn.GroupNorm(1, width), nn.ConvTranspose2d(width, width, kernel_size=2, stride=2))
        self.fpn3 = nn.GroupNorm(1, width)
        self.fpn4 = nn.Sequential(nn.GroupNorm(1, width), nn.MaxPool2d(kernel_size=2, stride=2))

    def pyramid(self, layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The transformer's maps (N, C, h, w) by name -> the outputs by name, 4, 2, 1 and 1/2 times as fine."""
        heads = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return {name: head(layers[layer]) for name, head, layer in zip(NAMES, heads, self.layers, strict=True)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        patch = self.patch_size
        strides = (patch // 4, patch // 2, patch, patch * 2)
        return {
            name: ShapeSpec(channels=self.width, stride=stride) for name, stride in zip(NAMES, strides, strict=True)
        }

    @property
    def size_divisibility(self) -> int:
        return 2 * self.patch_size


class ViTPyramid(Pyramid, PretrainedBackbone):
    """A backbone of transformer and pyramid."""


def check_blocks(key: str, blocks: Sequence[int], depth: int) -> None:
    """Refuse blocks that do not exist, or that leave blocks behind the last of them to train for nothing.

    Raises:
        ValueError: they are not numbers from 0 up to ``depth - 1``, in order, which is among them.
    """
    if not blocks or list(blocks) != sorted(set(blocks)) or blocks[0] < 0 or blocks[-1] != depth - 1:
        raise ValueError(f"{key}: {list(blocks)}; expected four blocks in order, from 0, the last of them {depth - 1}")
