"""From an aggregated cost volume to class maps at four times its size (FGA-seg, arXiv 2501.00877, section III-D)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.pixel_classification.class_rows import ClassRows, in_chunks
from ovseg_d2.modeling.pixel_classification.cost_aggregation import Fusion

#: Channels of a group of the decoder's GroupNorms.
GROUP = 16


class GuidedDoubleConv(nn.Module):
    """Twice convolution, GroupNorm, ReLU; the first convolution sees [x; guidance].

    What the guidance adds is computed once an image.
    """

    def __init__(self, *, in_dim: int, out_dim: int) -> None:
        """``in_dim``: of x and guidance together."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(out_dim // GROUP, out_dim)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(out_dim // GROUP, out_dim)

    def forward(self, rows: ClassRows, x: Tensor, guidance: Tensor | None) -> Tensor:
        """(R, C, h, w) and (N, G, h, w), or None without -> (R, out_dim, h, w)."""
        own = self.conv1.weight[:, : x.shape[1]]
        y = F.conv2d(x, own, padding=1)
        if guidance is not None:
            y += rows.of_images(F.conv2d(guidance, self.conv1.weight[:, x.shape[1] :], padding=1))
        y = F.relu(self.norm1(y), inplace=True)
        return F.relu(self.norm2(self.conv2(y)), inplace=True)


class UpsamplingStage(nn.Module):
    """Twice the resolution: a transposed convolution, then convolutions with guidance."""

    def __init__(self, *, in_dim: int, out_dim: int, guidance_dim: int = 0, up_dim: int | None = None) -> None:
        """
        Args:
            in_dim, out_dim: C, of maps before and after; ``out_dim`` a multiple of 16.
            guidance_dim: G; 0: there is none.
            up_dim: C between the transposed convolution and the others.
        """
        super().__init__()
        if out_dim % GROUP:
            raise ValueError(f"MODEL.OVSEG.FGA_SEG.DECODER_DIMS has {out_dim}; expected multiples of {GROUP}")
        up_dim = in_dim - guidance_dim if up_dim is None else up_dim
        self.up = nn.ConvTranspose2d(in_dim, up_dim, 2, stride=2)
        self.conv = GuidedDoubleConv(in_dim=up_dim + guidance_dim, out_dim=out_dim)

    def forward(self, rows: ClassRows, x: Tensor, guidance: Tensor | None) -> Tensor:
        """(R, h, w, C) and (N, G, 2h, 2w), or None without -> (R, 2h, 2w, out_dim)."""
        return self.conv(rows, self.up(x.permute(0, 3, 1, 2)), guidance).permute(0, 2, 3, 1)


class CostDecoder(nn.Module):
    """Two upsampling stages, guided by early feature maps, and a head.

    The features of the local similarity join before each stage, brought to its resolution by a stage without guidance.
    """

    def __init__(
        self,
        *,
        dim: int = 128,
        dims: Sequence[int] = (64, 32),
        feature_dims: Sequence[int] = (256, 128),
        guidance_dims: Sequence[int] = (32, 16),
        fusion: str | None = "cat",
        aux_heads: bool = False,
        chunk_size: int = 64,
    ) -> None:
        """
        Args:
            dim: C, of the cost volume.
            dims: C after each of the two stages, multiples of 16.
            feature_dims: C of the feature maps that guide the stages.
            guidance_dims: to which they are projected.
            fusion: how features of the local similarity join, see :class:`Fusion`; None: there are none (CAT-Seg).
            aux_heads: predict before each stage too, for a loss and for the fast path.
            chunk_size: rows that are computed at a time where no gradient is wanted.

        Raises:
            ValueError: other than two stages, or widths that do not go with each other.
        """
        super().__init__()
        if not len(dims) == len(feature_dims) == len(guidance_dims) == 2:
            raise ValueError(
                f"MODEL.OVSEG.FGA_SEG.DECODER_DIMS is {list(dims)}, with guidance of {list(feature_dims)} and "
                f"{list(guidance_dims)} channels; expected two of each, as the decoder has two stages"
            )
        self.chunk_size = chunk_size
        in_dims = (dim, dims[0])
        self.guidance = nn.ModuleList(
            nn.Conv2d(features, guidance, 3, padding=1)
            for features, guidance in zip(feature_dims, guidance_dims, strict=True)
        )
        self.stages = nn.ModuleList(
            UpsamplingStage(in_dim=in_dim, out_dim=out_dim, guidance_dim=guidance)
            for in_dim, out_dim, guidance in zip(in_dims, dims, guidance_dims, strict=True)
        )
        self.fusions = self.local_stage = None
        if fusion is not None:
            self.fusions = nn.ModuleList(Fusion(dim=in_dim, mode=fusion) for in_dim in in_dims)
            self.local_stage = UpsamplingStage(in_dim=dim, out_dim=dims[0], up_dim=dims[0])
        self.aux_heads = nn.ModuleList(nn.Conv2d(d, 1, 3, padding=1) for d in in_dims) if aux_heads else None
        self.head = nn.Conv2d(dims[1], 1, 3, padding=1)

    def forward(
        self,
        rows: ClassRows,
        x: Tensor,
        local: Tensor | None,
        features: Sequence[Tensor],
        *,
        with_aux: bool = False,
        top_k: int = 0,
    ) -> tuple[ClassRows, Tensor, list[Tensor]]:
        """
        Args:
            rows: whose maps these are.
            x: (R, h, w, C) aggregated cost volume.
            local: (R, h, w, C) features of the local similarity; None without.
            features: the maps (N, C', 2h, 2w) and (N, C'', 4h, 4w) that guide the stages.
            with_aux: compute what the auxiliary heads predict.
            top_k: with it, rule out, before each stage, classes that are among the best ``top_k`` of no pixel of their
                image; 0: none.

        Returns:
            The rows that are left, their logits (R', 4h, 4w), and the logits (N, E, h, w) and (N, E, 2h, 2w) of the
            auxiliary heads, none if they were not asked.
        """
        aux = []
        for index, stage in enumerate(self.stages):
            if self.fusions is not None:
                x = self.fusions[index](x, local)
            if with_aux:
                logits = head_logits(self.aux_heads[index], x)
                aux.append(rows.to_entries(logits))
                if top_k:
                    chosen = chosen_rows(rows, logits, top_k)
                    rows, x = rows.select(chosen), x[chosen]
                    local = None if local is None else local[chosen]
            guidance = F.relu(self.guidance[index](features[index]))
            if index == 0:
                if local is not None:
                    local = self._in_chunks(self.local_stage, rows, local, None)
                x = self._in_chunks(stage, rows, x, guidance)

        def finish(rows: ClassRows, x: Tensor) -> Tensor:
            return head_logits(self.head, self.stages[1](rows, x, guidance))

        return rows, in_chunks(finish, rows, x, size=self.chunk_size), aux

    def _in_chunks(self, stage: nn.Module, rows: ClassRows, x: Tensor, guidance: Tensor | None) -> Tensor:
        return in_chunks(lambda part, y: stage(part, y, guidance), rows, x, size=self.chunk_size)


def head_logits(head: nn.Conv2d, x: Tensor) -> Tensor:
    """(R, h, w, C) -> (R, h, w)."""
    return head(x.permute(0, 3, 1, 2))[:, 0]


def chosen_rows(rows: ClassRows, logits: Tensor, top_k: int) -> Tensor:
    """Which classes are among the best ``top_k`` of any pixel of their image (section III-D): (R, h, w) -> (R,) bool.

    The public code keeps one set of classes a batch, and with more classes than its aggregation has places for, one of
    places, which are other classes in each image.
    """
    packed, _ = rows.packed()
    scores = packed.to_entries(logits, fill=float("-inf"))
    best = scores.topk(min(top_k, scores.shape[1]), dim=1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True).flatten(2).any(dim=2)
    return packed.of_entries(chosen)
