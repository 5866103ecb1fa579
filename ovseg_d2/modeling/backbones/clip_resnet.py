"""CLIP's ResNets as detectron2 backbones (arXiv 2103.00020, section 2.4; DenseCLIP, arXiv 2112.01518).

Stem and layers under open_clip's names, below ``encoder.tower``; the pooling by attention is left out.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from ovseg_d2.modeling.backbones.clip_weights import ClipWeights
from ovseg_d2.modeling.clip.architectures import tower_kind
from ovseg_d2.modeling.clip.build import build_clip
from ovseg_d2.modeling.clip.resnet import ClipResNet
from ovseg_d2.modeling.clip.trainable import apply_policy

NORMS = ("SyncBN", "BN", "FrozenBN")
NAMES = ("res2", "res3", "res4", "res5")


@BACKBONE_REGISTRY.register()
class ClipResNetBackbone(ClipWeights):
    """Maps ``res2`` to ``res5`` of strides 4 to 32; of a RN50 with 256, 512, 1024 and 2048 channels."""

    @configurable
    def __init__(self, *, encoder: ClipResNet, norm: str = "SyncBN", clip_name: str = "", pretrained: str = "") -> None:
        """
        Args:
            encoder: it loses its attention pool.
            norm: "SyncBN" and "BN" train, on the statistics of all processes or of one; "FrozenBN" stays as CLIP's.
            clip_name, pretrained: of the weights, see ``load_clip_pretrained``.

        Raises:
            ValueError: another ``norm``.
        """
        super().__init__()
        encoder.tower.attnpool = None
        convert_norms(encoder, norm)
        self.encoder = encoder
        self.clip_name, self.pretrained = clip_name, pretrained

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        clip = cfg.MODEL.OVSEG.CLIP
        if tower_kind(clip.NAME) != "resnet":
            raise ValueError(
                f"MODEL.OVSEG.CLIP.NAME: {clip.NAME} has no ResNet of CLIP, which ClipResNetBackbone is made of; "
                "expected for example RN50-quickgelu"
            )
        encoder = build_clip(clip.NAME, visual_kwargs={"use_checkpoint": clip.USE_CHECKPOINT}, with_text=False).visual
        apply_policy(encoder, clip.TRAINABLE)
        return {
            "encoder": encoder,
            "norm": cfg.MODEL.CLIP_RESNET.NORM,
            "clip_name": clip.NAME,
            "pretrained": clip.PRETRAINED,
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) normalised -> the four maps by name."""
        layers = self.encoder(images, masks_only=True).layers
        return {name: layers[name] for name in NAMES}

    def output_shape(self) -> dict[str, ShapeSpec]:
        shapes = self.encoder.output_shape()
        return {name: shapes[name] for name in NAMES}

    @property
    def size_divisibility(self) -> int:
        return 32


def convert_norms(encoder: ClipResNet, norm: str) -> None:
    """Put the batch norms of a kind of :data:`NORMS` in the place of CLIP's, with the same weights.

    Raises:
        ValueError: there is no such kind.
    """
    if norm not in NORMS:
        raise ValueError(f"MODEL.CLIP_RESNET.NORM: got {norm!r}; expected one of {', '.join(NORMS)}")
    if norm == "SyncBN":
        encoder.tower = nn.SyncBatchNorm.convert_sync_batchnorm(encoder.tower)
    elif norm == "FrozenBN":
        encoder.tower = FrozenBatchNorm2d.convert_frozen_batchnorm(encoder.tower)
