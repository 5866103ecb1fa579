"""Multi-scale deformable attention in plain PyTorch (Deformable DETR, arXiv 2010.04159, equation 3).

Nothing is compiled: on CUDA the bilinear reads are one ``grid_sample`` a level; on CPU all levels, heads and points are
one ``embedding_bag``, a gather of whole rows with weights, which is several times faster there
(``tools/benchmark.py`` measures both).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def deformable_sampling_by_grid(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The same as :func:`deformable_sampling`, with one ``grid_sample`` a level."""
    n, _, heads, dim = value.shape
    _, queries, _, levels, points, _ = locations.shape
    grids = 2 * locations - 1
    sampled = []
    for level, (level_value, (h, w)) in enumerate(
        zip(value.split([h * w for h, w in spatial_shapes], dim=1), spatial_shapes, strict=True)
    ):
        level_map = level_value.permute(0, 2, 3, 1).reshape(n * heads, dim, h, w)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(level_map, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(n * heads, 1, queries, levels * points)
    out = (torch.stack(sampled, dim=-2).flatten(-2) * weights).sum(-1)
    return out.view(n, heads * dim, queries).transpose(1, 2).contiguous()


def deformable_sampling_by_rows(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The same as :func:`deformable_sampling`, as one weighted sum of the rows of a table.

    Every level gets a border of zeros and locations are clamped into it, so that no corner of a bilinear cell needs a
    validity test: outside, the weights fall on zeros.
    """
    n, _, heads, dim = value.shape
    queries = locations.shape[1]
    device, dtype = locations.device, locations.dtype
    parts = [
        F.pad(part.reshape(n, h, w, heads * dim), (0, 0, 1, 1, 1, 1)).flatten(1, 2)
        for part, (h, w) in zip(value.split([h * w for h, w in spatial_shapes], dim=1), spatial_shapes, strict=True)
    ]
    table = torch.cat(parts, dim=1)
    rows = table.shape[1]

    sizes = torch.tensor([[w, h] for h, w in spatial_shapes], device=device, dtype=dtype)[:, None]  # (levels, 1, 2)
    strides = torch.tensor([w + 2 for _, w in spatial_shapes], device=device, dtype=torch.int32)
    starts = torch.tensor([0] + [part.shape[1] for part in parts[:-1]], device=device).cumsum(0).int()
    head_ids = torch.arange(heads, device=device, dtype=torch.int32)[:, None, None]
    image_starts = torch.arange(n, device=device, dtype=torch.int32).view(n, 1, 1, 1, 1) * (rows * heads)

    # In the padded map the pixel centres lie at 1 .. size, hence + 1 - 0.5.
    position = torch.minimum((locations * sizes + 0.5).clamp(min=0), sizes + 1)
    corner = torch.minimum(position.detach().floor(), sizes)
    fraction_x, fraction_y = (position - corner).unbind(-1)
    corner_x, corner_y = corner.int().unbind(-1)
    # The clamp keeps a NaN location inside the table; the NaN goes on through the weights.
    first = (corner_y * strides[:, None] + corner_x).clamp(min=0) + starts[:, None]
    neighbours = torch.stack([torch.zeros_like(strides), torch.ones_like(strides), strides, strides + 1], dim=-1)
    indices = (first * heads + head_ids + image_starts)[..., None] + (neighbours * heads)[:, None]

    bottom = fraction_y * weights
    top = weights - bottom
    bottom_right, top_right = fraction_x * bottom, fraction_x * top
    corner_weights = torch.stack([top - top_right, top_right, bottom - bottom_right, bottom_right], dim=-1)
    out = F.embedding_bag(
        indices.view(n * queries * heads, -1),
        table.view(n * rows * heads, dim),
        mode="sum",
        per_sample_weights=corner_weights.view(n * queries * heads, -1),
    )
    return out.view(n, queries, heads * dim)


def deformable_sampling(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear reads (zeros outside, pixel centres at (i + 0.5) / size).

    Args:
        value: (N, L, heads, dim), the levels one after the other, each row-major.
        spatial_shapes: (h, w) of each level; their products sum to L.
        locations: (N, queries, heads, levels, points, 2), x and y in units of the map: 0 to 1 is inside.
        weights: (N, queries, heads, levels, points).

    Returns:
        (N, queries, heads * dim).
    """
    sample = deformable_sampling_by_grid if value.is_cuda else deformable_sampling_by_rows
    return sample(value, spatial_shapes, locations, weights)


class MSDeformAttn(nn.Module):
    """Each query reads ``num_points`` places a level and head, at learned offsets from its reference point.

    Sampling runs in float32 whatever the autocast dtype, as bfloat16 cannot address a pixel of a large map.
    """

    def __init__(self, *, dim: int = 256, num_levels: int = 3, num_heads: int = 8, num_points: int = 4) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"MSDeformAttn: dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets start as a star: one direction a head, one step further a point."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        star = torch.stack([angles.cos(), angles.sin()], dim=-1)
        star = star / star.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = star[:, None, None] * steps[None, None, :, None]
        offsets = offsets.expand(self.num_heads, self.num_levels, self.num_points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def sampling_inputs(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values, locations and weights, as :func:`deformable_sampling` takes them, in float32."""
        n, queries, _ = query.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        values = self.value_proj(value)
        if padding_mask is not None:
            values = values.masked_fill(padding_mask[..., None], 0.0)
        values = values.view(n, value.shape[1], heads, -1).float()
        offsets = self.sampling_offsets(query).view(n, queries, heads, levels, points, 2).float()
        weights = self.attention_weights(query).view(n, queries, heads, levels * points).float().softmax(-1)
        reference = reference_points.float()[:, :, None, :, None]
        if reference.shape[-1] == 2:
            sizes = torch.tensor([[w, h] for h, w in spatial_shapes], device=query.device, dtype=torch.float32)
            locations = reference + offsets / sizes[:, None]
        else:
            locations = reference[..., :2] + offsets / points * reference[..., 2:] * 0.5
        return values, locations, weights.view(n, queries, heads, levels, points)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            query: (N, queries, C).
            reference_points: (N, queries, levels, 2) x, y, or (N, queries, levels, 4) centre x, y, width, height;
                0 to 1 is inside the map.
            value: (N, L, C), the levels one after the other.
            spatial_shapes: (h, w) of each level.
            padding_mask: (N, L) bool, True where ``value`` is padding and counts as zero.

        Returns:
            (N, queries, C).
        """
        values, locations, weights = self.sampling_inputs(query, reference_points, value, spatial_shapes, padding_mask)
        return self.output_proj(deformable_sampling(values, spatial_shapes, locations, weights))
