"""A vision transformer of timm with DenseCLIP's feature pyramid (MTA-CLIP, arXiv 2407.21654, Table 3: ViT-S).

For weights of ImageNet. Modules are timm's, below ``trunk``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ovseg_d2.checkpoint.io import read_state_dict
from ovseg_d2.modeling.backbones.vit_pyramid import ViTPyramid, check_blocks
from ovseg_d2.modeling.layers.position_embedding import resize_position_embedding

_NAME_KEY = "MODEL.TIMM_VIT_FPN.NAME"
#: What timm's weights have behind the blocks, for the embedding of a whole image.
_HEADS = ("norm.", "fc_norm.", "head.", "pre_logits.")


@BACKBONE_REGISTRY.register()
class TimmViTFPN(ViTPyramid):
    """The pyramid on four blocks of a plain ViT: absolute positions, one class token."""

    blocks_key = "MODEL.TIMM_VIT_FPN.OUT_BLOCKS"
    weights_key = "MODEL.TIMM_VIT_FPN.PRETRAINED"

    @configurable
    def __init__(
        self,
        *,
        trunk: VisionTransformer,
        out_blocks: Sequence[int],
        norm: str = "SyncBN",
        use_checkpoint: bool = False,
        name: str = "",
        pretrained: str = "",
    ) -> None:
        """
        Args:
            trunk: it loses its last norm and its classifier.
            out_blocks: the blocks, from 0, whose outputs become ``res2`` to ``res5``.
            norm: detectron2's name of the normalisation within the head of ``res2``.
            use_checkpoint: recompute activations in the backward pass.
            name, pretrained: of the weights: timm's name of the model, and a tag of timm or a file.

        Raises:
            ValueError: blocks that do not exist, or a ViT of another kind.
        """
        check_blocks(self.blocks_key, out_blocks, len(trunk.blocks))
        super().__init__(
            width=trunk.embed_dim,
            patch_size=trunk.patch_embed.patch_size[0],
            layers=[f"block{i}" for i in out_blocks],
            norm=norm,
        )
        if trunk.cls_token is None or trunk.num_prefix_tokens != 1 or trunk.no_embed_class or trunk.pos_embed is None:
            raise ValueError(f"{_NAME_KEY}: {name} is no ViT with one class token and a table of all positions")
        trunk.norm, trunk.fc_norm, trunk.head_drop, trunk.head = (nn.Identity() for _ in range(4))
        self.trunk = trunk
        self.use_checkpoint = use_checkpoint
        self.name, self.pretrained = name, pretrained

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        vit = cfg.MODEL.TIMM_VIT_FPN
        return {
            "trunk": build_timm_vit(vit.NAME, drop_path_rate=vit.DROP_PATH_RATE),
            "out_blocks": vit.OUT_BLOCKS,
            "norm": vit.NORM,
            "use_checkpoint": vit.USE_CHECKPOINT,
            "name": vit.NAME,
            "pretrained": vit.PRETRAINED,
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) normalised -> the four maps by name."""
        trunk = self.trunk
        patches = trunk.patch_embed.proj(images)
        grid = (patches.shape[2], patches.shape[3])
        x = torch.cat([trunk.cls_token.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        pos = resize_position_embedding(trunk.pos_embed, grid, mode="bilinear", align_corners=False)
        x = trunk.norm_pre(x + pos.to(x.dtype))
        layers = {}
        for index, block in enumerate(trunk.blocks):
            recompute = self.use_checkpoint and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            if f"block{index}" in self.layers:
                layers[f"block{index}"] = x[:, 1:].transpose(1, 2).unflatten(2, grid)
        return self.pyramid(layers)

    @property
    def weights_name(self) -> str:
        return self.pretrained

    def pretrained_names(self) -> list[str]:
        return [name for name in self.state_dict() if name.startswith("trunk.")]

    def load_pretrained(self) -> str:
        weights, source = read_timm_weights(self.name, self.pretrained)
        own = self.trunk.state_dict()
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(_HEADS)}
        wrong = [name for name, tensor in own.items() if name not in weights or weights[name].shape != tensor.shape]
        wrong += [name for name in weights if name not in own]
        if wrong:
            raise ValueError(
                f"{self.weights_key}: the weights of {source} are not those of {self.name}: {len(wrong)} tensors "
                f"differ, first {wrong[0]}"
            )
        self.trunk.load_state_dict(weights)
        return f"{self.name}: {len(weights)} tensors of {source}"


def build_timm_vit(name: str, *, drop_path_rate: float) -> VisionTransformer:
    """timm's ViT with random weights; nothing is fetched.

    Raises:
        ValueError: timm has no such model, or it is none of its plain ViTs.
    """
    if "." in name or not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"{name.split('.')[0][:9]}*")[:6]) or "vit_small_patch16_384"
        raise ValueError(
            f"{_NAME_KEY}: timm has no architecture {name!r} (weights are named by {TimmViTFPN.weights_key}); it has "
            f"{similar}"
        )
    trunk = timm.create_model(name, drop_path_rate=drop_path_rate)
    if type(trunk) is not VisionTransformer:
        raise ValueError(f"{_NAME_KEY}: {name} is a {type(trunk).__name__}; expected one of timm's VisionTransformers")
    return trunk


def read_timm_weights(name: str, pretrained: str) -> tuple[dict[str, Tensor], str]:
    """The state dict of the model ``name`` with a tag of timm, fetched if it is not cached, or from a file; and what
    messages call it.

    Raises:
        ValueError: no such tag or file, or it cannot be fetched.
    """
    key = TimmViTFPN.weights_key
    path = Path(pretrained).expanduser()
    if path.is_file():
        return read_state_dict(path), str(path)
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    if pretrained not in tags:
        raise ValueError(f"{key}: {pretrained!r} is no file and no tag of {name}; expected one of {', '.join(tags)}")
    full_name = f"{name}.{pretrained}"
    try:
        return timm.create_model(full_name, pretrained=True).state_dict(), full_name
    except Exception as error:  # whatever the network, the server or the disk did
        raise ValueError(
            f"{key}: the weights of {full_name} are not cached and could not be fetched ({type(error).__name__}); "
            f"fetch model.safetensors of the Hugging Face repository timm/{full_name} and set {key} to its path"
        ) from error
