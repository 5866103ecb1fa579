"""Spatial aggregation of a cost volume (CAT-Seg, arXiv 2303.11797): Swin blocks that see the image too."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.layers.windows import from_windows, to_windows, window_mask
from ovseg_d2.modeling.pixel_classification.class_rows import ClassRows
from ovseg_d2.modeling.pixel_classification.guided_attention import GuidedProjection, TwoLinears


class GuidedSwinBlock(nn.Module):
    """A Swin block without position bias, whose queries and keys see the image's features too."""

    def __init__(self, *, dim: int, guidance_dim: int, num_heads: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = GuidedProjection(dim=dim, guidance_dim=guidance_dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = TwoLinears(dim=dim, hidden_dim=mlp_ratio * dim, activation=F.gelu)

    def forward(self, rows: ClassRows, x: Tensor, guidance: Tensor, *, window_size: int, shift: int) -> Tensor:
        """
        Args:
            rows: whose maps these are.
            x: (R, h, w, C).
            guidance: (N, h, w, G), normalised.
            window_size: side of the windows; the map is padded to whole windows, and nothing looks at the padding.
            shift: of the windows.

        Returns:
            (R, h, w, C).
        """
        size = (x.shape[1], x.shape[2])
        qkv = self.qkv(self.norm1(x), guidance, rows)
        windows = to_windows(qkv, window_size=window_size, shift=shift)  # (R * windows, L, 3C)
        q, k, v = windows.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mask = window_mask(size, window_size=window_size, shift=shift, hide_padding=True, device=x.device)
        if mask is not None:
            mask = mask.to(q.dtype).repeat(len(q) // len(mask), 1, 1)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)
        x = x + self.proj(from_windows(out, size, window_size=window_size, shift=shift))
        return x + self.mlp(self.norm2(x))


class SpatialAggregation(nn.Module):
    """Two guided Swin blocks for every class, the second with shifted windows."""

    def __init__(self, *, dim: int, guidance_dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.blocks = nn.ModuleList(
            GuidedSwinBlock(dim=dim, guidance_dim=guidance_dim, num_heads=num_heads) for _ in range(2)
        )
        self.guidance_norm = nn.LayerNorm(guidance_dim)

    def forward(self, rows: ClassRows, x: Tensor, guidance: Tensor) -> Tensor:
        """Maps (R, h, w, C) and the images' features (N, h, w, G) -> (R, h, w, C)."""
        shortest = min(x.shape[1:3])
        window_size, shift = min(self.window_size, shortest), self.window_size // 2
        if shortest <= self.window_size:  # one window across: the public code does not shift then
            shift = 0
        guidance = self.guidance_norm(guidance)
        first, second = self.blocks
        x = first(rows, x, guidance, window_size=window_size, shift=0)
        return second(rows, x, guidance, window_size=window_size, shift=shift)
