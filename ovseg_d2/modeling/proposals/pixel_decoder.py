"""Pixel decoder of Mask2Former (arXiv 2112.01527, sections 3.2.2 and 4.1): a deformable encoder over the coarse feature
maps, then an FPN up to the resolution of the masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.layers.ms_deform_attn import MSDeformAttn
from ovseg_d2.modeling.layers.position_encoding import SinePositionEncoding


@dataclass
class PixelFeatures:
    """mask_features (N, mask_dim, h, w) at the common stride; multi_scale: maps (N, C, h_i, w_i), coarsest first."""

    mask_features: Tensor
    multi_scale: list[Tensor]


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each normalised after its skip connection."""

    def __init__(self, *, dim: int, ffn_dim: int, num_levels: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(dim=dim, num_levels=num_levels, num_heads=num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self, x: Tensor, pos: Tensor, reference_points: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """x, pos: (N, L, C); reference_points: (N, L, levels, 2) -> (N, L, C)."""
        update = self.self_attn(x + pos, reference_points, x, spatial_shapes)
        x = self.norm1(x + self.dropout(update))
        update = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm2(x + self.dropout(update))


def pixel_centres(spatial_shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Centres (x, y) of all pixels of all levels, in [0, 1], level after level: (L, 2)."""
    centres = []
    for h, w in spatial_shapes:
        y = (torch.arange(h, device=device, dtype=torch.float32) + 0.5) / h
        x = (torch.arange(w, device=device, dtype=torch.float32) + 0.5) / w
        centres.append(torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1).flatten(0, 1))
    return torch.cat(centres)


class MSDeformAttnPixelDecoder(nn.Module):
    """Backbone features to per-pixel mask embeddings and three feature maps for the mask decoder.

    Runs in float32 under autocast, as the public implementation does: the encoder's sampling offsets need it.
    """

    NUM_SCALES = 3  # maps for the mask decoder

    def __init__(
        self,
        *,
        input_shape: dict[str, ShapeSpec],
        encoder_features: Sequence[str],
        dim: int,
        mask_dim: int,
        ffn_dim: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        norm: str,
        common_stride: int,
    ) -> None:
        """
        Args:
            input_shape: channels and stride of each backbone feature to be used.
            encoder_features: which of them the deformable encoder sees; the FPN takes up the others.
            norm: normalisation of the FPN's convolutions (detectron2's names); "" for none.
            common_stride: stride of ``mask_features``.
        """
        super().__init__()
        by_stride = sorted(input_shape, key=lambda name: input_shape[name].stride)
        unknown = [name for name in encoder_features if name not in input_shape]
        if unknown:
            raise ValueError(
                f"MODEL.OVSEG.PROPOSALS.ENC_FEATURES: {unknown} are not among IN_FEATURES {sorted(input_shape)}"
            )
        # Coarsest first, as the levels everywhere; only the FPN's lists begin at the finest, as in public checkpoints.
        self.encoder_features = [name for name in reversed(by_stride) if name in encoder_features]
        finest_stride = min(input_shape[name].stride for name in self.encoder_features)
        num_fpn = max(int(math.log2(finest_stride) - math.log2(common_stride)), 0)
        self.fpn_features = by_stride[:num_fpn]

        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(input_shape[name].channels, dim, 1), nn.GroupNorm(32, dim))
            for name in self.encoder_features
        )
        self.level_embed = nn.Parameter(torch.randn(len(self.encoder_features), dim))
        self.position_encoding = SinePositionEncoding(dim=dim)
        self.encoder = nn.ModuleList(
            DeformableEncoderLayer(
                dim=dim,
                ffn_dim=ffn_dim,
                num_levels=len(self.encoder_features),
                num_heads=num_heads,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )
        bias = norm == ""
        self.lateral = nn.ModuleList(
            Conv2d(input_shape[name].channels, dim, kernel_size=1, bias=bias, norm=get_norm(norm, dim))
            for name in self.fpn_features
        )
        self.output = nn.ModuleList(
            Conv2d(dim, dim, kernel_size=3, padding=1, bias=bias, norm=get_norm(norm, dim), activation=F.relu)
            for _ in self.fpn_features
        )
        self.mask_features = nn.Conv2d(dim, mask_dim, 1)
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        for conv in (*self.lateral, *self.output, self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, features: dict[str, Tensor]) -> PixelFeatures:
        """features: name -> (N, C, h, w), at least those of ``input_shape``."""
        device_type = next(iter(features.values())).device.type
        with torch.autocast(device_type=device_type, enabled=False):
            maps = self._encode([features[name].float() for name in self.encoder_features])
            for i in reversed(range(len(self.fpn_features))):
                y = self.lateral[i](features[self.fpn_features[i]].float())
                y = y + F.interpolate(maps[-1], size=y.shape[-2:], mode="bilinear", align_corners=False)
                maps.append(self.output[i](y))
            return PixelFeatures(mask_features=self.mask_features(maps[-1]), multi_scale=maps[: self.NUM_SCALES])

    def encoder_inputs(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]]:
        """Flattened levels (N, L, C), their position encoding (1, L, C), reference points (1, L, levels, 2), sizes."""
        maps = [projection(feature) for projection, feature in zip(self.input_proj, features, strict=True)]
        shapes = [(int(m.shape[-2]), int(m.shape[-1])) for m in maps]
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        pos = torch.cat(
            [
                self.position_encoding(m).flatten(2).transpose(1, 2) + embed
                for m, embed in zip(maps, self.level_embed, strict=True)
            ],
            dim=1,
        )
        reference_points = pixel_centres(shapes, x.device)[None, :, None].expand(-1, -1, len(maps), -1)
        return x, pos, reference_points, shapes

    def _encode(self, features: Sequence[Tensor]) -> list[Tensor]:
        x, pos, reference_points, shapes = self.encoder_inputs(features)
        for layer in self.encoder:
            x = layer(x, pos, reference_points, shapes)
        levels = x.split([h * w for h, w in shapes], dim=1)
        return [
            level.transpose(1, 2).unflatten(-1, (h, w)).contiguous()
            for level, (h, w) in zip(levels, shapes, strict=True)
        ]
