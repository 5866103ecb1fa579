"""Swin Transformer as a detectron2 backbone (arXiv 2103.14030, section 3).

Written out rather than taken from timm: on feature maps that are no multiple of the window, timm shifts first and pads
afterwards, while the public segmentation models pad first and shift afterwards, and their weights expect that.
Modules are named as in the public checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from ovseg_d2.modeling.layers.windows import from_windows, to_windows, window_mask

PATCH_SIZE = 4
MLP_RATIO = 4


class PatchEmbed(nn.Module):
    """Non-overlapping patches, linearly embedded and normalised."""

    def __init__(self, *, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, h, w, C), any size: the last patches are filled with zeros."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % PATCH_SIZE, 0, -height % PATCH_SIZE))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Concatenate 2 x 2 neighbours and halve the resulting width."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, h, w, C) -> (N, ceil(h / 2), ceil(w / 2), 2C)."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)]  # column by column, as the weights expect
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class WindowAttention(nn.Module):
    """Self-attention inside windows with a learned bias for each relative position (equation 4)."""

    def __init__(self, *, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", _relative_position_index(window_size), persistent=False)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """
        Args:
            windows: (N * windows, L, C), the windows of one image after each other.
            mask: (windows, L, L) added to the logits, None: nothing.

        Returns:
            (N * windows, L, C).
        """
        q, k, v = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # (1, heads, L, L)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        if mask is not None:
            bias = bias + mask[:, None]
            bias = bias.expand(len(windows) // len(mask), *bias.shape).flatten(0, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Window attention and an MLP, each normalised before and added after (equation 3)."""

    def __init__(self, *, dim: int, num_heads: int, window_size: int, shift: int, drop_path_rate: float) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim=dim, num_heads=num_heads, window_size=window_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim=dim, hidden_dim=MLP_RATIO * dim)
        self.drop_path = StochasticDepth(drop_path_rate, "row")

    def forward(self, x: Tensor, shift_mask: Tensor | None) -> Tensor:
        """(N, h, w, C) and the mask of shifted windows -> (N, h, w, C)."""
        x = x + self.drop_path(self._attend(self.norm1(x), shift_mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, shift_mask: Tensor | None) -> Tensor:
        windows = to_windows(x, window_size=self.window_size, shift=self.shift)
        windows = self.attn(windows, shift_mask if self.shift else None)
        return from_windows(windows, (x.shape[1], x.shape[2]), window_size=self.window_size, shift=self.shift)


class SwinStage(nn.Module):
    """Blocks of one resolution, then the merge into the next stage's."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        window_size: int,
        drop_path_rates: Sequence[float],
        downsample: bool,
        use_checkpoint: bool,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim=dim,
                num_heads=num_heads,
                window_size=window_size,
                shift=window_size // 2 if index % 2 else 0,
                drop_path_rate=rate,
            )
            for index, rate in enumerate(drop_path_rates)
        )
        self.downsample = PatchMerging(dim=dim) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, h, w, C) -> (N, h, w, C); the caller applies ``downsample``, since outputs are taken before it."""
        mask = window_mask(
            (x.shape[1], x.shape[2]), window_size=self.window_size, shift=self.window_size // 2, device=x.device
        )
        for block in self.blocks:
            if self.use_checkpoint and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return x


@BACKBONE_REGISTRY.register()
class SwinTransformer(Backbone):
    """Four stages at strides 4, 8, 16 and 32 with a LayerNorm for each output.

    Args:
        in_channels: channels of the images.
        embed_dim: width of the first stage; each next one is twice as wide.
        depths, num_heads: blocks and attention heads of each stage.
        window_size: side of the attention windows, in tokens.
        drop_path_rate: of the last block, rising linearly from 0 at the first.
        out_features: any of "res2", "res3", "res4", "res5".
        freeze_at: detectron2's meaning: 0 freezes nothing, 1 the patch embedding, 2 also "res2", and so on.
        use_checkpoint: recompute activations in the backward pass.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int = 3,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        drop_path_rate: float = 0.0,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        freeze_at: int = 0,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        names = [f"res{index + 2}" for index in range(len(depths))]
        if not out_features or not set(out_features) <= set(names):
            raise ValueError(f"MODEL.SWIN.OUT_FEATURES: got {list(out_features)}, allowed is any of {names}")
        if len(num_heads) != len(depths):
            raise ValueError(
                f"MODEL.SWIN: NUM_HEADS has {len(num_heads)} values and DEPTHS {len(depths)}; expected as many"
            )
        self._out_features = [name for name in names if name in out_features]
        names = names[: names.index(self._out_features[-1]) + 1]  # a stage that nobody asks for is not built
        dims = [embed_dim * 2**index for index in range(len(names))]
        self._out_feature_channels = dict(zip(names, dims, strict=True))
        self._out_feature_strides = {name: PATCH_SIZE * 2**index for index, name in enumerate(names)}
        self._freeze_at = freeze_at

        self.patch_embed = PatchEmbed(in_channels=in_channels, dim=embed_dim)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList(
            SwinStage(
                dim=dim,
                num_heads=heads,
                window_size=window_size,
                drop_path_rates=[next(rates) for _ in range(depth)],
                downsample=index < len(names) - 1,
                use_checkpoint=use_checkpoint,
            )
            for index, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=False))
        )
        for index, (name, dim) in enumerate(zip(names, dims, strict=True)):
            if name in self._out_features:
                self.add_module(f"norm{index}", nn.LayerNorm(dim))
        self.apply(_init_weights)
        for module in self._frozen():
            module.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        swin = cfg.MODEL.SWIN
        return {
            "in_channels": input_shape.channels,
            "embed_dim": swin.EMBED_DIM,
            "depths": swin.DEPTHS,
            "num_heads": swin.NUM_HEADS,
            "window_size": swin.WINDOW_SIZE,
            "drop_path_rate": swin.DROP_PATH_RATE,
            "out_features": swin.OUT_FEATURES,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "use_checkpoint": swin.USE_CHECKPOINT,
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> {"res2": (N, C, ceil(H / 4), ceil(W / 4)), ...}, any size."""
        outputs = {}
        x = self.patch_embed(images)
        for index, stage in enumerate(self.layers):
            x = stage(x)
            name = f"res{index + 2}"
            if name in self._out_features:
                outputs[name] = getattr(self, f"norm{index}")(x).permute(0, 3, 1, 2).contiguous()
            if stage.downsample is not None:
                x = stage.downsample(x)
        return outputs

    @property
    def size_divisibility(self) -> int:
        return PATCH_SIZE * 2 ** (len(self.layers) - 1)

    def train(self, mode: bool = True) -> SwinTransformer:
        """As usual, but frozen stages stay in evaluation mode (no stochastic depth)."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        if self._freeze_at < 1:
            return []
        return [self.patch_embed, *self.layers[: self._freeze_at - 1]]


def _relative_position_index(window_size: int) -> Tensor:
    """(L, L): the row of the bias table for each pair of tokens of a window."""
    position = torch.arange(window_size)
    offset = position[:, None] - position[None, :] + window_size - 1  # (query, key) in [0, 2 * window - 2]
    index = offset[:, None, :, None] * (2 * window_size - 1) + offset[None, :, None, :]
    return index.flatten(2).flatten(0, 1)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, WindowAttention):
        nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
