"""CLIP's vision transformer (arXiv 2103.00020, section 2.4) as open_clip builds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

from ovseg_d2.modeling.clip.token_encoder import ClipTokenEncoder, join_heads, split_heads
from ovseg_d2.modeling.layers.position_embedding import resize_position_embedding


class ClipViT(ClipTokenEncoder):
    """Image encoder over open_clip's ``VisionTransformer``, its attention weights packed or split."""

    def __init__(
        self,
        tower: VisionTransformer,
        *,
        extra_class_embedding: bool = False,
        drop_path_rate: float = 0.0,
        **options: Any,
    ) -> None:
        """
        Args:
            extra_class_embedding: add the class embedding a second time, as DenseCLIP and ZegCLIP do and as their
                weights expect.
            drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first (DenseCLIP 0.1).
            options: those of :class:`ClipTokenEncoder`.

        Raises:
            ValueError: a tower that pools, or attends, in another way than CLIP's.
        """
        blocks = tower.transformer.resblocks
        if tower.attn_pool is not None or tower.pool_type != "tok":
            raise ValueError(
                f"this ViT pools by {tower.pool_type!r} or attention; only class tokens ('tok') are supported"
            )
        if not all(isinstance(block, ResidualAttentionBlock) and block.attn.batch_first for block in blocks):
            raise ValueError(f"blocks of type {type(blocks[0]).__name__}; expected open_clip's batch-first ones")
        super().__init__(
            tower,
            width=tower.conv1.out_channels,
            num_heads=blocks[0].attn.num_heads,
            num_layers=len(blocks),
            patch_size=tower.conv1.kernel_size[0],
            **options,
        )
        self.extra_class_embedding = extra_class_embedding
        self.drop_rates = [drop_path_rate * i / max(len(blocks) - 1, 1) for i in range(len(blocks))]

    @property
    def embed_dim(self) -> int:
        return self.tower.proj.shape[1]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.tower.transformer.resblocks

    def embed(self, images: Tensor, prompts: Any = None) -> tuple[Tensor, tuple[int, int]]:
        tower = self.tower
        patches = tower.conv1(images)
        grid = (patches.shape[2], patches.shape[3])
        patches = patches.flatten(2).transpose(1, 2)
        if prompts is not None:
            patches = prompts.start(patches)
        class_token = tower.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        pos = resize_position_embedding(
            tower.positional_embedding, grid, mode=self.pos_mode, align_corners=self.pos_align_corners
        ).to(patches.dtype)
        if self.extra_class_embedding:
            pos = torch.cat([pos[:1] + tower.class_embedding.to(pos.dtype), pos[1:]])
        # open_clip's patch dropout would tear holes into the grid, so it is left out.
        return tower.ln_pre(torch.cat([class_token, patches], dim=1) + pos), grid

    def rotation(self, grid: tuple[int, int]) -> None:
        return None

    def project(self, index: int, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        block = self.blocks[index]
        attn, x = block.attn, block.ln_1(x)
        if attn.in_proj_weight is not None:
            parts = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
        else:
            weights = (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight)
            parts = [F.linear(x, w, b) for w, b in zip(weights, attn.in_proj_bias.chunk(3), strict=True)]
        query, key, value = (split_heads(part, attn.num_heads) for part in parts)
        return query, key, value

    def attention_update(self, index: int, heads: Tensor) -> Tensor:
        block = self.blocks[index]
        return self._drop(index, block.ls_1(block.attn.out_proj(join_heads(heads))))

    def mlp_update(self, index: int, x: Tensor) -> Tensor:
        block = self.blocks[index]
        return self._drop(index, block.ls_2(block.mlp(block.ln_2(x))))

    def head(self, x: Tensor) -> Tensor:
        return self.tower.ln_post(x) @ self.tower.proj

    def _drop(self, index: int, update: Tensor) -> Tensor:
        return stochastic_depth(update, self.drop_rates[index], "row", self.training)
