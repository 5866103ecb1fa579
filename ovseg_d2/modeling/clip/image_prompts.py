"""What is learned beside CLIP's patches, or in place of some; a tower with frozen weights takes it in by three hooks.

``start(patches)`` sees the patches (N, L, C) before they get positions, ``insert(index, x, num_patches)`` says what
enters a block, ``norm(x)`` follows the last one.
"""

from __future__ import annotations

import math

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.clip.vit import ClipViT


class DeepImagePrompts(nn.Module):
    """P tokens between class token and patches for every block (VPT-deep, arXiv 2203.12119, section 3.2), in place of
    what the block before made of them (ZegCLIP, LDVC).

    They are inserted behind the position table and CLIP's first norm, so they have neither.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_tokens: int,
        dim: int,
        patch_size: int,
        dropout: float = 0.1,
        project: bool = True,
        last_norm: bool = True,
    ) -> None:
        """
        Args:
            num_layers: blocks with prompts, from the first; those behind run without.
            num_tokens: P.
            dim: C, the width of the tower.
            patch_size: of the tower; VPT draws the initial values by it.
            dropout: of the prompts as they enter a block.
            project: a linear layer, shared by all blocks, before that.
            last_norm: a learned norm before the tower's own last one.
        """
        super().__init__()
        self.embeddings = nn.Parameter(torch.empty(num_layers, num_tokens, dim))
        self.proj = nn.Linear(dim, dim) if project else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.last_norm = nn.LayerNorm(dim, eps=1e-6) if last_norm else nn.Identity()
        limit = math.sqrt(6 / (3 * patch_size**2 + dim))
        nn.init.uniform_(self.embeddings, -limit, limit)
        if project:
            nn.init.kaiming_normal_(self.proj.weight, mode="fan_out")

    def start(self, patches: Tensor) -> Tensor:
        """The patches as they are."""
        return patches

    def insert(self, index: int, x: Tensor, num_patches: int) -> Tensor:
        """What enters block ``index``: (N, 1 + L, C), or with the last block's prompts, -> (N, 1 + P + L, C)."""
        parts = [x[:, :1], x[:, -num_patches:]]
        if index < len(self.embeddings):
            prompts = self.dropout(self.proj(self.embeddings[index].expand(len(x), -1, -1)))
            parts.insert(1, prompts.to(x.dtype))
        return torch.cat(parts, dim=1)

    def norm(self, x: Tensor) -> Tensor:
        """After the last block, before CLIP's own last norm: (N, L, C) -> (N, L, C)."""
        return self.last_norm(x)


class PromptTokens(nn.Module):
    """P tokens for every one of the first blocks, without projection, dropout or norm (FGA-seg, "Prompt-16").

    Behind those blocks the last of them go on as any other token. The image's last block needs none where patches do
    not look at each other there.
    """

    def __init__(self, *, num_layers: int, num_tokens: int, dim: int) -> None:
        """See :class:`DeepImagePrompts`."""
        super().__init__()
        self.embeddings = nn.Parameter(torch.empty(num_layers, num_tokens, dim))
        nn.init.xavier_uniform_(self.embeddings)

    def start(self, patches: Tensor) -> Tensor:
        """The patches as they are."""
        return patches

    def insert(self, index: int, x: Tensor, num_patches: int) -> Tensor:
        """What enters block ``index``: (N, 1 + L, C) or (N, 1 + P + L, C) -> (N, 1 + P + L, C)."""
        if index >= len(self.embeddings):
            return x
        prompts = self.embeddings[index].to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x[:, :1], prompts, x[:, -num_patches:]], dim=1)

    def norm(self, x: Tensor) -> Tensor:
        """(N, L, C), as they are."""
        return x


class MaskPrompts(nn.Module):
    """Learned embeddings for the patches of a crop that its mask leaves out (OVSeg, arXiv 2210.04150, section 3.3).

    They start as zeros, which is what patches of the mean colour are embedded as. CLIP itself is not changed.
    """

    def __init__(self, *, depth: int, num_patches: int, dim: int) -> None:
        """
        Args:
            depth: blocks that are entered with them, from the first.
            num_patches: of a crop, each position has its own; 1: all positions share one.
            dim: C, the width of the tower.
        """
        super().__init__()
        self.embeddings = nn.Parameter(torch.zeros(depth, num_patches, dim))

    def forward(self, masks: Tensor, patch_size: int) -> MaskedPatches:
        """
        Args:
            masks: (N, H, W) the masks of N crops, bool or in [0, 1].
            patch_size: of the tower.

        Returns:
            What the tower takes with those crops.

        Raises:
            ValueError: crops of another size than the embeddings are for.
        """
        # The public code rounds the mean of a patch up: a patch with any pixel of the mask stays.
        kept = F.max_pool2d(masks[:, None].float(), patch_size).flatten(1) > 0
        known = self.embeddings.shape[1]
        if known not in (1, kept.shape[1]):
            raise ValueError(
                f"mask prompts for {known} patches; a crop of {masks.shape[1]} x {masks.shape[2]} pixels has "
                f"{kept.shape[1]} (MODEL.OVSEG.CROPS.SIZE)"
            )
        return MaskedPatches(kept[..., None], self.embeddings)


class MaskedPatches:
    """The hooks of :class:`MaskPrompts` for one batch of crops."""

    def __init__(self, kept: Tensor, embeddings: Tensor) -> None:
        """
        Args:
            kept: (N, L, 1) bool, the patches that stay.
            embeddings: (depth, L or 1, C).
        """
        self.kept, self.embeddings = kept, embeddings

    def start(self, patches: Tensor) -> Tensor:
        """(N, L, C) -> (N, L, C)."""
        return torch.where(self.kept, patches, self.embeddings[0].to(patches.dtype))

    def insert(self, index: int, x: Tensor, num_patches: int) -> Tensor:
        """(N, 1 + L, C) -> the same; the class token is not touched."""
        if not 0 < index < len(self.embeddings):
            return x
        patches = torch.where(self.kept, x[:, -num_patches:], self.embeddings[index].to(x.dtype))
        return torch.cat([x[:, :-num_patches], patches], dim=1)

    def norm(self, x: Tensor) -> Tensor:
        """(N, 1 + L, C), as they are."""
        return x


def build_mask_prompts(cfg: CfgNode, clip: Clip) -> MaskPrompts | None:
    """The mask prompts that ``MODEL.OVSEG.CROPS`` asks for; None if it asks for none.

    Raises:
        ValueError: a tower without patches, more prompts than it has blocks, or crops without a mask of their own.
    """
    crops, key = cfg.MODEL.OVSEG.CROPS, "MODEL.OVSEG.CROPS.MASK_PROMPTS"
    depth = crops.MASK_PROMPTS
    if not depth:
        return None
    if not isinstance(clip.visual, ClipViT):
        raise ValueError(f"{key} is {depth}, but {cfg.MODEL.OVSEG.CLIP.NAME} is no ViT of open_clip's; expected 0")
    num_layers = len(clip.visual.blocks)
    if not 0 < depth <= num_layers:
        raise ValueError(f"{key} is {depth}; expected 0 to {num_layers}, the blocks of {cfg.MODEL.OVSEG.CLIP.NAME}")
    if crops.STYLE != "mask_crop":
        raise ValueError(f"{key} is {depth}, which needs MODEL.OVSEG.CROPS.STYLE 'mask_crop'; got {crops.STYLE!r}")
    return MaskPrompts(depth=depth, num_patches=(crops.SIZE // clip.visual.patch_size) ** 2, dim=clip.visual.width)
