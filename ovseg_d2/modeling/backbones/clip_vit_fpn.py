"""CLIP's vision transformer with a feature pyramid, as a detectron2 backbone (DenseCLIP, arXiv 2112.01518).

Modules are named as in DenseCLIP's checkpoints, below ``encoder.tower`` as in open_clip's.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from ovseg_d2.modeling.backbones.clip_weights import ClipWeights
from ovseg_d2.modeling.backbones.vit_pyramid import ViTPyramid, check_blocks
from ovseg_d2.modeling.clip.architectures import model_config
from ovseg_d2.modeling.clip.build import build_clip
from ovseg_d2.modeling.clip.trainable import apply_policy
from ovseg_d2.modeling.clip.vit import ClipViT


@BACKBONE_REGISTRY.register()
class ClipViTFPN(ClipWeights, ViTPyramid):
    """The pyramid on four blocks of the ViT that ``MODEL.OVSEG.CLIP`` names."""

    blocks_key = "MODEL.CLIP_VIT_FPN.OUT_BLOCKS"

    @configurable
    def __init__(self, *, encoder: ClipViT, norm: str = "SyncBN", clip_name: str = "", pretrained: str = "") -> None:
        """
        Args:
            encoder: with four ``out_layers``, from the finest to the coarsest map.
            norm: detectron2's name of the normalisation within the head of ``res2``.
            clip_name, pretrained: of the weights, see ``load_clip_pretrained``.

        Raises:
            ValueError: another number of ``out_layers``.
        """
        super().__init__(width=encoder.width, patch_size=encoder.patch_size, layers=encoder.out_layers, norm=norm)
        self.encoder = encoder
        self.clip_name, self.pretrained = clip_name, pretrained

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        clip, fpn = cfg.MODEL.OVSEG.CLIP, cfg.MODEL.CLIP_VIT_FPN
        vision = model_config(clip.NAME)["vision_cfg"]
        if "timm_model_name" in vision or not isinstance(vision["layers"], int):
            raise ValueError(f"MODEL.OVSEG.CLIP.NAME: {clip.NAME} has no ViT of open_clip, which ClipViTFPN is made of")
        check_blocks(cls.blocks_key, fpn.OUT_BLOCKS, vision["layers"])
        options = {
            "out_layers": [f"block{i}" for i in fpn.OUT_BLOCKS],
            "last_block": "none",
            "extra_class_embedding": True,
            "drop_path_rate": fpn.DROP_PATH_RATE,
            "pos_mode": "bilinear",
            "use_checkpoint": clip.USE_CHECKPOINT,
        }
        encoder = build_clip(clip.NAME, visual_kwargs=options, with_text=False).visual
        if fpn.IMAGE_SIZE:
            set_position_grid(encoder, fpn.IMAGE_SIZE, key="MODEL.CLIP_VIT_FPN.IMAGE_SIZE")
        apply_policy(encoder, clip.TRAINABLE)
        # They make the image's embedding, which no map depends on.
        encoder.tower.ln_post.requires_grad_(False)
        encoder.tower.proj.requires_grad_(False)
        return {"encoder": encoder, "norm": fpn.NORM, "clip_name": clip.NAME, "pretrained": clip.PRETRAINED}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) normalised -> the four maps by name."""
        return self.pyramid(self.encoder(images).layers)


def set_position_grid(encoder: ClipViT, image_size: int, *, key: str) -> None:
    """Give an encoder a position table for square images of ``image_size``, as DenseCLIP and ZegCLIP store it.

    Args:
        key: the config's, for errors.

    Raises:
        ValueError: the image is not made of whole patches.
    """
    if image_size % encoder.patch_size:
        raise ValueError(
            f"{key}: got {image_size}; expected a multiple of the patches' {encoder.patch_size} pixels, or 0"
        )
    rows = 1 + (image_size // encoder.patch_size) ** 2
    table = encoder.tower.positional_embedding
    encoder.tower.positional_embedding = nn.Parameter(
        table.new_zeros(rows, table.shape[1]), requires_grad=table.requires_grad
    )
