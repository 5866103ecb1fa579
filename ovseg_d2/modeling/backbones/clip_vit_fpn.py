"""CLIP's vision transformer with a feature pyramid, as a detectron2 backbone (DenseCLIP, arXiv 2112.01518).

Four of the blocks give maps of one stride, that of the patches; small heads bring them to 1/4, 1/2, 1 and 2 times it.
Modules are named as in DenseCLIP's checkpoints, below ``encoder.tower`` as in open_clip's.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ovseg_d2.modeling.clip.architectures import model_config
from ovseg_d2.modeling.clip.build import build_clip
from ovseg_d2.modeling.clip.trainable import apply_policy
from ovseg_d2.modeling.clip.vit import ClipViT

NAMES = ("res2", "res3", "res4", "res5")


@BACKBONE_REGISTRY.register()
class ClipViTFPN(Backbone):
    """Maps ``res2`` to ``res5``, with 16 x 16 patches of strides 4 to 32, all of the transformer's width."""

    @configurable
    def __init__(self, *, encoder: ClipViT, norm: str = "SyncBN") -> None:
        """
        Args:
            encoder: with four ``out_layers``, from the finest to the coarsest map.
            norm: detectron2's name of the normalisation within the head of ``res2``.

        Raises:
            ValueError: another number of ``out_layers``.
        """
        super().__init__()
        if len(encoder.out_layers) != len(NAMES):
            raise ValueError(
                f"MODEL.CLIP_VIT_FPN.OUT_BLOCKS: {len(encoder.out_layers)} blocks "
                f"({', '.join(encoder.out_layers) or 'none'}); expected {len(NAMES)}"
            )
        self.encoder = encoder
        width = encoder.width
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

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        clip, fpn = cfg.MODEL.OVSEG.CLIP, cfg.MODEL.CLIP_VIT_FPN
        vision = model_config(clip.NAME)["vision_cfg"]
        if "timm_model_name" in vision or not isinstance(vision["layers"], int):
            raise ValueError(f"MODEL.OVSEG.CLIP.NAME: {clip.NAME} has no ViT of open_clip, which ClipViTFPN is made of")
        options = {
            "out_layers": [f"block{i}" for i in fpn.OUT_BLOCKS],
            "last_block": "none",
            "extra_class_embedding": True,
            "drop_path_rate": fpn.DROP_PATH_RATE,
            "pos_mode": "bilinear",
            "use_checkpoint": clip.USE_CHECKPOINT,
        }
        encoder = build_clip(clip.NAME, visual_kwargs=options, with_text=False).visual
        apply_policy(encoder, clip.TRAINABLE)
        # They make the image's embedding, which no map depends on.
        encoder.tower.ln_post.requires_grad_(False)
        encoder.tower.proj.requires_grad_(False)
        return {"encoder": encoder, "norm": fpn.NORM}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) normalised -> the four maps by name."""
        return self.pyramid(self.encoder(images).layers)

    def pyramid(self, layers: dict[str, Tensor]) -> dict[str, Tensor]:
        """The encoder's maps (N, C, h, w) -> those of :meth:`forward`."""
        heads = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return {
            name: head(layers[layer]) for name, head, layer in zip(NAMES, heads, self.encoder.out_layers, strict=True)
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        patch = self.encoder.patch_size
        strides = (patch // 4, patch // 2, patch, patch * 2)
        return {
            name: ShapeSpec(channels=self.encoder.width, stride=stride)
            for name, stride in zip(NAMES, strides, strict=True)
        }

    @property
    def size_divisibility(self) -> int:
        return 2 * self.encoder.patch_size
