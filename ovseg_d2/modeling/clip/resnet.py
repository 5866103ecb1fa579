"""CLIP's ResNets (arXiv 2103.00020, section 2.4): a stem of three convolutions, pooling by attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ovseg_d2.modeling.clip.image_encoder import ClipImageEncoder, check_option
from ovseg_d2.modeling.clip.mask_bias import hard_mask_bias, soft_mask_bias
from ovseg_d2.modeling.layers.mask_pooling import downsample_masks
from ovseg_d2.modeling.layers.position_embedding import MODES, resize_position_embedding
from ovseg_d2.structures import ClipFeatures


class ClipResNet(ClipImageEncoder):
    """Layers ``stem`` (stride 2) and ``res2`` to ``res5``.

    An image is pooled by attention: the query is the mean of all positions, keys and values are the mean and the
    positions. For a region the query is the same, and keys and values are the positions inside its mask; in MAFT the
    mean stays among them.
    """

    def __init__(
        self,
        tower: nn.Module,
        *,
        dense: str = "none",
        mask_pooling: str = "hard",
        mask_logit_scale: float = -5.0,
        learn_mask_logit_scale: bool = True,
        pos_mode: str = "bilinear",
        pos_align_corners: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        """
        Args:
            tower: open_clip's ``ModifiedResNet``.
            dense: what :meth:`forward` computes for every position: "none"; "attention": the pooling with each position
                as a query (DenseCLIP, MAFT); "value": each position sees only itself (MaskCLIP++).
            mask_pooling: "hard": positions outside are left out (FC-CLIP). "soft" (MaskCLIP++): where the mask is above
                half its maximum, exp(s) times the mask is added to the logits, elsewhere -100. "maft": the mean and the
                positions where the mask is at least 0.5 (section 5.5); an empty mask leaves the mean alone.
            mask_logit_scale: first value of s, one a head; only for "soft".
            learn_mask_logit_scale: whether s is a parameter.
            pos_mode, pos_align_corners: how the table of positions is resized. Bilinear without aligned corners:
                FC-CLIP, DenseCLIP; bicubic with aligned corners: MAFT, MaskCLIP++.
        """
        super().__init__(tower, use_checkpoint=use_checkpoint)
        check_option("dense", dense, ("none", "attention", "value"))
        check_option("mask_pooling", mask_pooling, ("hard", "soft", "maft"))
        check_option("pos_mode", pos_mode, MODES)
        self.dense = dense
        self.mask_pooling = mask_pooling
        self.resize_pos = partial(resize_position_embedding, mode=pos_mode, align_corners=pos_align_corners)
        if mask_pooling == "soft":
            scale = torch.full((tower.attnpool.num_heads,), mask_logit_scale)
            if learn_mask_logit_scale:
                self.mask_logit_scale = nn.Parameter(scale)
            else:
                self.register_buffer("mask_logit_scale", scale, persistent=False)

    @property
    def embed_dim(self) -> int:
        return self.tower.attnpool.c_proj.out_features

    def output_shape(self) -> dict[str, ShapeSpec]:
        width = self.tower.conv3.out_channels
        shapes = {"stem": ShapeSpec(channels=width, stride=2)}
        for i in range(4):
            shapes[f"res{i + 2}"] = ShapeSpec(channels=width * 4 * 2**i, stride=4 * 2**i)
        return shapes

    def forward(self, images: Tensor, *, masks_only: bool = False) -> ClipFeatures:
        tower = self.tower
        x = images
        for i in ("1", "2", "3"):
            x = getattr(tower, f"conv{i}")(x)
            x = getattr(tower, f"act{i}")(getattr(tower, f"bn{i}")(x))
        layers = {"stem": x}
        x = tower.avgpool(x)
        for i, layer in enumerate((tower.layer1, tower.layer2, tower.layer3, tower.layer4)):
            for block in layer:
                x = self._run(block, x)
            layers[f"res{i + 2}"] = x

        grid = (x.shape[-2], x.shape[-1])
        if masks_only:
            return ClipFeatures(image_embeds=None, dense=None, layers=layers, grid=grid)
        tokens = self.tokens(x)
        dense = None
        if self.dense == "attention":
            dense = self._attend(tokens[:, 1:], tokens)
        elif self.dense == "value":
            dense = tower.attnpool.c_proj(tower.attnpool.v_proj(tokens[:, 1:]))
        return ClipFeatures(
            image_embeds=self.pool(tokens),
            dense=None if dense is None else dense.transpose(1, 2).unflatten(-1, grid),
            layers=layers,
            grid=grid,
        )

    def encode_masks(self, features: ClipFeatures, masks: Tensor, *, from_logits: bool = False) -> Tensor:
        tokens = self.tokens(features.layers["res5"])
        keys = tokens if self.mask_pooling == "maft" else tokens[:, 1:]
        if self.mask_pooling in ("soft", "maft"):
            allowed = self.mask_bias(downsample_masks(masks.sigmoid() if from_logits else masks, features.grid))
        else:
            inside = downsample_masks(masks if from_logits else masks - 0.5, features.grid).flatten(2) > 0
            # An empty mask sees the whole image: a softmax over nothing would be NaN, as it is in FC-CLIP.
            allowed = (inside | ~inside.any(dim=-1, keepdim=True))[:, None]
        return self._attend(tokens[:, :1].expand(-1, masks.shape[1], -1), keys, allowed)

    def tokens(self, last: Tensor) -> Tensor:
        """The last map (N, C, h, w) -> mean and positions (N, 1 + h * w, C), with their position embeddings."""
        x = last.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        return x + self.resize_pos(self.tower.attnpool.positional_embedding, tuple(last.shape[-2:])).to(x.dtype)

    def pool(self, tokens: Tensor) -> Tensor:
        """The embeddings of whole images, (N, D), from :meth:`tokens`."""
        return self._attend(tokens[:, :1], tokens).squeeze(1)

    def mask_bias(self, masks: Tensor) -> Tensor:
        """Masks (N, Q, h, w) in [0, 1] -> what "soft" pooling, (N, heads, Q, h * w), or "maft", (N, 1, Q, 1 + h * w),
        adds to the logits."""
        if self.mask_pooling == "soft":
            return soft_mask_bias(masks, self.mask_logit_scale)
        # All copies of the mean are the same in this only layer, so that one of them is every copy's own.
        return F.pad(hard_mask_bias(masks), (1, 0))

    def _attend(self, query: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The pool's attention: queries (N, Q, C) to tokens (N, L, C) -> (N, Q, D); mask (N, heads or 1, Q, L)."""
        pool = self.tower.attnpool
        q, k, v = (
            projection(x).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
            for projection, x in ((pool.q_proj, query), (pool.k_proj, tokens), (pool.v_proj, tokens))
        )
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return pool.c_proj(out.transpose(1, 2).flatten(-2))

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if not (self.use_checkpoint and torch.is_grad_enabled()):
            return block(x)
        return checkpoint(block, x, use_reentrant=False, context_fn=partial(_recompute_contexts, block))


def _recompute_contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _running_statistics_kept(block)


@contextmanager
def _running_statistics_kept(block: nn.Module) -> Iterator[None]:
    """BatchNorms do not update their running statistics: the first pass through the block has done so."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, num_batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(num_batches)
