"""EVA-CLIP's vision transformers (arXiv 2303.15389; EVA-02, arXiv 2303.11331) as timm builds them for open_clip."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from timm.layers import apply_rot_embed_cat, build_rotary_pos_embed
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.clip.token_encoder import ClipTokenEncoder, join_heads, split_heads
from ovseg_d2.modeling.layers.position_embedding import resize_position_embedding

#: EVA-CLIP's names within a block (patterns) -> timm's. The biases of unfused projections are parameters of their own
#: there.
EVA_CLIP_RENAMES = (
    (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
    (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)


def timm_names_from_eva_clip(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of EVA-CLIP's image tower to those of timm's ``Eva``; values stay as they are.

    Args:
        state_dict: by name, without a prefix: ``cls_token``, ``blocks.0.attn.q_proj.weight``, ...

    Returns:
        The same without rotary tables, which are no weights.
    """
    renamed = {}
    for key, value in state_dict.items():
        if re.search(r"(^|\.)rope\.", key):
            continue
        for pattern, replacement in EVA_CLIP_RENAMES:
            key = re.sub(pattern, replacement, key)
        match = re.fullmatch(r"(.*\.attn\.)([qv])_bias", key)
        if match and f"{match[1]}{match[2]}_proj.weight" in state_dict:
            key = f"{match[1]}{match[2]}_proj.bias"
        renamed[key] = value
    return renamed


class ClipEva(ClipTokenEncoder):
    """Image encoder over timm's ``Eva`` in open_clip's ``TimmModel``: EVA-02 with rotary positions, EVA-01 without."""

    def __init__(self, tower: TimmModel, **options: Any) -> None:
        """
        Args:
            options: those of :class:`ClipTokenEncoder`.

        Raises:
            ValueError: an Eva of another make than EVA-CLIP's.
        """
        trunk: Eva = tower.trunk
        problem = None
        if trunk.global_pool != "token" or trunk.attn_pool is not None:
            problem = f"pools by {trunk.global_pool!r}, expected 'token'"
        elif trunk.num_prefix_tokens != 1 or trunk.pos_embed is None or trunk.no_embed_class:
            problem = "has register tokens or no position table for its class token"
        elif not all(type(block) is EvaBlock and type(block.attn) is EvaAttention for block in trunk.blocks):
            problem = f"has blocks of type {type(trunk.blocks[0]).__name__}, expected EvaBlock with EvaAttention"
        elif trunk.blocks[0].attn.gate is not None:
            problem = "has gated attention"
        elif trunk.rope is not None and type(trunk.rope) is not RotaryEmbeddingCat:
            problem = f"rotates by {type(trunk.rope).__name__}, expected RotaryEmbeddingCat"
        if problem:
            raise ValueError(f"this timm Eva {problem}; not supported")
        super().__init__(
            tower,
            width=trunk.embed_dim,
            num_heads=trunk.blocks[0].attn.num_heads,
            num_layers=len(trunk.blocks),
            patch_size=trunk.patch_embed.patch_size[0],
            **options,
        )

    @property
    def embed_dim(self) -> int:
        # timm's own classifier is the projection, or open_clip adds one behind it.
        layers = [layer for layer in (self.tower.trunk.head, *self.tower.head) if isinstance(layer, nn.Linear)]
        return layers[-1].out_features if layers else self.tower.trunk.embed_dim

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.tower.trunk.blocks

    def embed(self, images: Tensor, prompts: Any = None) -> tuple[Tensor, tuple[int, int]]:
        trunk = self.tower.trunk
        # Not through patch_embed, which insists on the size that it was built for.
        patches = trunk.patch_embed.proj(images)
        grid = (patches.shape[2], patches.shape[3])
        patches = trunk.patch_embed.norm(patches.flatten(2).transpose(1, 2))
        if prompts is not None:
            patches = prompts.start(patches)
        class_token = trunk.cls_token.to(patches.dtype).expand(len(patches), -1, -1)
        pos = resize_position_embedding(
            trunk.pos_embed, grid, mode=self.pos_mode, align_corners=self.pos_align_corners
        ).to(patches.dtype)
        return trunk.norm_pre(trunk.pos_drop(torch.cat([class_token, patches], dim=1) + pos)), grid

    def rotation(self, grid: tuple[int, int]) -> Tensor | None:
        """Sines and cosines (h * w, 2 * C / heads); coordinates are scaled to the tower's reference grid."""
        rope = self.tower.trunk.rope
        if rope is None:
            return None
        sin, cos = build_rotary_pos_embed(
            list(grid),
            dim=rope.dim,
            max_res=rope.max_res,
            temperature=rope.temperature,
            linear_bands=rope.linear_bands,
            in_pixels=rope.in_pixels,
            ref_feat_shape=rope.ref_feat_shape,
            grid_offset=rope.grid_offset,
            grid_indexing=rope.grid_indexing,
            rotate_half=rope.rotate_half,
            grid_type=rope.grid_type,
            normalize_coords=rope.normalize_coords,
            device=self.tower.trunk.pos_embed.device,
        )
        return torch.cat([sin, cos], dim=-1)

    def project(self, index: int, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        block = self.blocks[index]
        attn, x = block.attn, block.norm1(x)
        if attn.qkv is not None:
            bias = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
            parts = F.linear(x, attn.qkv.weight, bias).chunk(3, dim=-1)
        else:
            parts = (attn.q_proj(x), attn.k_proj(x), attn.v_proj(x))
        query, key, value = (split_heads(part, attn.num_heads) for part in parts)
        query, key = attn.q_norm(query), attn.k_norm(key)
        if rotation is not None:
            query, key = (self._rotate(y, rotation, half=attn.rotate_half).type_as(value) for y in (query, key))
        return query, key, value

    @staticmethod
    def _rotate(x: Tensor, rotation: Tensor, *, half: bool) -> Tensor:
        """Turn the last rows of x (N, heads, L, C), one for each row of ``rotation``."""
        first = x.shape[2] - len(rotation)
        return torch.cat([x[:, :, :first], apply_rot_embed_cat(x[:, :, first:], rotation, half=half)], dim=2)

    def attention_update(self, index: int, heads: Tensor) -> Tensor:
        block = self.blocks[index]
        update = block.attn.proj_drop(block.attn.proj(block.attn.norm(join_heads(heads))))
        return block.drop_path1(update if block.gamma_1 is None else block.gamma_1 * update)

    def mlp_update(self, index: int, x: Tensor) -> Tensor:
        block = self.blocks[index]
        update = block.mlp(block.norm2(x))
        return block.drop_path2(update if block.gamma_2 is None else block.gamma_2 * update)

    def head(self, x: Tensor) -> Tensor:
        trunk = self.tower.trunk
        return self.tower.head(trunk.head(trunk.head_drop(trunk.fc_norm(trunk.norm(x)))))
