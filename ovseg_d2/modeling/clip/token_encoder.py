"""What CLIP's vision transformers share: any input size, intermediate maps, dense embeddings, mask tokens.

The forward pass is the project's own, over the modules and parameters of open_clip's and timm's towers. Those give one
embedding an image of one size; segmentation wants more from the same weights:

* dense embeddings, from a last block that keeps a patch's own content (``last_block``):

  - ``full``: the ordinary block;
  - ``value``: no attention, each position keeps its own value (MaskCLIP, arXiv 2112.01071, section 3.2);
  - ``value_cls``: the same, but with the class token on the skip connection of every position (FGA-seg's code);
  - ``sclip``: query-query plus key-key attention (SCLIP, arXiv 2312.01597, equation 4);
  - ``clearclip``: query-query attention without skip connection and feed-forward network (ClearCLIP, arXiv
    2407.12442, section 3);
  - ``proxy``: the same with the attention of another network (ProxyCLIP, arXiv 2408.04883, section 3.3);

* embeddings of masks (:mod:`ovseg_d2.modeling.clip.mask_bias`).

The image's embedding always comes from the ordinary path, which ends before the last block if nobody wants it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ovseg_d2.modeling.clip.image_encoder import ClipImageEncoder, check_option
from ovseg_d2.modeling.clip.mask_bias import MASK_MODES, attend_masked, hard_mask_bias, soft_mask_bias
from ovseg_d2.modeling.layers.mask_pooling import downsample_masks
from ovseg_d2.structures import ClipFeatures

LAST_BLOCKS = ("full", "value", "value_cls", "sclip", "clearclip", "proxy")
#: Images (N, 3, H, W) and CLIP's grid -> the attention of its L patches to each other, (N, L, L).
Proxy = Callable[[Tensor, tuple[int, int]], Tensor]
#: MaskCLIP++ lets masks into the last three blocks of every tower.
MASKCLIPPP_BLOCKS = 3


@dataclass
class TokenStates:
    """States of N images on their way through the blocks.

    Attributes:
        last: (N, 1 + L, C) what leaves the last block, class token first; with prompts (N, 1 + P + L, C). None if the
            blocks that mask tokens enter were left out, or there is no image embedding.
        dense: the same from the ``last_block`` variant; None if there is none.
        layers: the same after single blocks, by ``block{i}``.
        start: (N, 1 + L, C) what enters the first block with mask tokens; None if there is none.
        grid: (h, w), L = h * w.
    """

    last: Tensor | None
    dense: Tensor | None
    layers: dict[str, Tensor]
    start: Tensor | None
    grid: tuple[int, int]


class ClipTokenEncoder(ClipImageEncoder):
    """Base of :class:`ClipViT` and :class:`ClipEva`, which say how a block of their tower works."""

    def __init__(
        self,
        tower: nn.Module,
        *,
        width: int,
        num_heads: int,
        num_layers: int,
        patch_size: int,
        out_layers: Sequence[str] = (),
        last_block: str = "full",
        image_embedding: bool = True,
        mask_mode: str = "none",
        start_layer: int | None = None,
        mask_logit_scale: float = -5.0,
        learn_mask_logit_scale: bool = True,
        pos_mode: str = "bicubic",
        pos_align_corners: bool = False,
        prompts: nn.Module | None = None,
        use_checkpoint: bool = False,
    ) -> None:
        """
        Args:
            tower: the visual module of an open_clip model.
            width, num_heads, num_layers, patch_size: of the tower.
            out_layers: ``block{i}``, i from 0: the outputs of blocks to return as maps.
            last_block: how the dense embeddings are made (see the module); "none": there are none.
            image_embedding: False leaves the image's embedding out, and what is computed for it alone.
            mask_mode: how :meth:`encode_masks` works, "maskclippp" or "maft"; "none": not at all.
            start_layer: the first block with mask tokens, from 0, or from the end if negative. None: MaskCLIP++'s
                choice, the third from the end.
            mask_logit_scale: first value of s, one a block with mask tokens and a head; only for "maskclippp".
            learn_mask_logit_scale: whether s is a parameter.
            pos_mode, pos_align_corners: how the position table is resized.
            prompts: learned tokens beside the patches, or in place of some, through the hooks of
                :mod:`ovseg_d2.modeling.clip.image_prompts`.
            use_checkpoint: recompute activations in the backward pass.

        Raises:
            ValueError: an option that does not exist, or does not fit the tower.
        """
        super().__init__(tower, use_checkpoint=use_checkpoint)
        check_option("last_block", last_block, ("none", *LAST_BLOCKS))
        check_option("mask_mode", mask_mode, ("none", *MASK_MODES))
        for name in out_layers:
            check_option("a name in out_layers", name, tuple(f"block{i}" for i in range(num_layers)))
        if mask_mode == "none":
            if start_layer is not None:
                raise ValueError(f"CLIP image encoder: start_layer is {start_layer}, but mask_mode is 'none'")
        else:
            start_layer = max(num_layers - MASKCLIPPP_BLOCKS, 0) if start_layer is None else start_layer
            if not -num_layers <= start_layer < num_layers:
                raise ValueError(
                    f"CLIP image encoder: start_layer is {start_layer}; expected {-num_layers} to {num_layers - 1}"
                )
            start_layer %= num_layers
            if prompts is not None:
                raise ValueError("CLIP image encoder: mask tokens do not go with prompts; expected mask_mode 'none'")
        self.width = width
        self.patch_size = patch_size
        self.out_layers = tuple(out_layers)
        self.last_block = last_block
        self.image_embedding = image_embedding
        self.mask_mode = mask_mode
        self.start_layer = start_layer
        self.pos_mode = pos_mode
        self.pos_align_corners = pos_align_corners
        self.prompts = prompts
        if mask_mode == "maskclippp":
            # Row 0 belongs to the last block, as in the published weights.
            scale = torch.full((num_layers - start_layer, num_heads), mask_logit_scale)
            if learn_mask_logit_scale:
                self.mask_logit_scale = nn.Parameter(scale)
            else:
                self.register_buffer("mask_logit_scale", scale, persistent=False)

    # ---- what a tower says of itself

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, first to last."""

    @abstractmethod
    def embed(self, images: Tensor, prompts: Any = None) -> tuple[Tensor, tuple[int, int]]:
        """(N, 3, H, W) -> what enters the first block (N, 1 + h * w, C), class token first, and (h, w)."""

    @abstractmethod
    def rotation(self, grid: tuple[int, int]) -> Tensor | None:
        """Rotary position embedding of the patches of an (h, w) grid; None if the tower has none."""

    @abstractmethod
    def project(self, index: int, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (N, heads, L, C / heads) of block ``index`` for what enters it, (N, L, C).

        ``rotation`` turns the last rows; None leaves all as they are.
        """

    @abstractmethod
    def attention_update(self, index: int, heads: Tensor) -> Tensor:
        """What attention in block ``index`` adds: (N, heads, L, C / heads) -> (N, L, C)."""

    @abstractmethod
    def mlp_update(self, index: int, x: Tensor) -> Tensor:
        """What the feed-forward network of block ``index`` adds: (N, L, C) -> (N, L, C)."""

    @abstractmethod
    def head(self, x: Tensor) -> Tensor:
        """Last norm and projection of every token: (N, L, C) -> (N, L, D)."""

    # ---- images

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: ShapeSpec(channels=self.width, stride=self.patch_size) for name in self.out_layers}

    def forward(
        self, images: Tensor, *, masks_only: bool = False, prompts: Any = None, proxy: Proxy | None = None
    ) -> ClipFeatures:
        """As in :class:`ClipImageEncoder`.

        Args:
            prompts: for these images, in place of the encoder's own (see the constructor).
            proxy: for ``last_block`` "proxy".

        Raises:
            ValueError: images smaller than a patch, or ``masks_only`` with ``mask_mode`` "none".
        """
        states = self.token_states(images, masks_only=masks_only, prompts=prompts, proxy=proxy)
        grid, dense = states.grid, None
        if states.dense is not None:
            dense = self._to_map(self.head(self._patches(states.dense, grid)), grid)
        return ClipFeatures(
            image_embeds=None if states.last is None else self.head(states.last[:, :1])[:, 0],
            dense=dense,
            layers={name: self._to_map(self._patches(x, grid), grid) for name, x in states.layers.items()},
            tokens=states.start,
            grid=grid,
        )

    def token_states(
        self, images: Tensor, *, masks_only: bool = False, prompts: Any = None, proxy: Proxy | None = None
    ) -> TokenStates:
        """Run the blocks over images (N, 3, H, W) of any size from one patch on; ``masks_only``: those before masks.

        Raises:
            ValueError: see :meth:`forward`.
        """
        if masks_only:
            check_option("mask_mode", self.mask_mode, MASK_MODES)
        if min(images.shape[-2:]) < self.patch_size:
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels; CLIP's patches are {self.patch_size} wide")
        prompts = self.prompts if prompts is None else prompts
        x, grid = self.embed(images, prompts)
        rotation = self.rotation(grid)
        layers: dict[str, Tensor] = {}
        start, entering = None, x
        for index in range(len(self.blocks)):
            if prompts is not None:
                x = prompts.insert(index, x, grid[0] * grid[1])
            if index == self.start_layer:
                start = x
                if masks_only:
                    return TokenStates(last=None, dense=None, layers=layers, start=start, grid=grid)
            entering = x
            if index == len(self.blocks) - 1 and not self._needs_last_block:
                break
            x = self._run(self._block, index, x, rotation)
            if f"block{index}" in self.out_layers:
                layers[f"block{index}"] = x
        dense = x if self.last_block == "full" else None
        if self.last_block not in ("none", "full"):
            assert (proxy is None) == (self.last_block != "proxy"), self.last_block
            weights = None if proxy is None else proxy(images, grid)
            dense = self._run(self._dense_block, len(self.blocks) - 1, entering, rotation, weights)
        last = x if self.image_embedding else None
        if prompts is not None:
            last, dense = (None if y is None else prompts.norm(y) for y in (last, dense))
        return TokenStates(last=last, dense=dense, layers=layers, start=start, grid=grid)

    @property
    def _needs_last_block(self) -> bool:
        """Whether anything comes from what leaves the ordinary last block."""
        return self.image_embedding or self.last_block == "full" or f"block{len(self.blocks) - 1}" in self.out_layers

    def _block(self, index: int, x: Tensor, rotation: Tensor | None) -> Tensor:
        x = x + self.attention_update(index, F.scaled_dot_product_attention(*self.project(index, x, rotation)))
        return x + self.mlp_update(index, x)

    def _dense_block(self, index: int, x: Tensor, rotation: Tensor | None, weights: Tensor | None) -> Tensor:
        """The ``last_block`` variant of block ``index``: (N, L, C) -> (N, L, C).

        ``weights`` (N, h * w, h * w): attention of the patches from elsewhere; then the patches alone come back.
        """
        query, key, value = self.project(index, x, rotation)
        if weights is not None:
            patches = value[:, :, -weights.shape[-1] :]
            return self.attention_update(index, weights[:, None].to(value.dtype) @ patches)
        if self.last_block in ("value", "value_cls"):
            heads = value
        else:
            heads = F.scaled_dot_product_attention(query, query, value)
            if self.last_block == "sclip":
                heads = heads + F.scaled_dot_product_attention(key, key, value)
        update = self.attention_update(index, heads)
        if self.last_block == "clearclip":
            return update
        x = update + (x[:, :1] if self.last_block == "value_cls" else x)
        return x + self.mlp_update(index, x)

    # ---- masks

    def encode_masks(self, features: ClipFeatures, masks: Tensor, *, from_logits: bool = False) -> Tensor:
        """As in :class:`ClipImageEncoder`.

        Raises:
            ValueError: the encoder was built with ``mask_mode`` "none".
        """
        check_option("mask_mode", self.mask_mode, MASK_MODES)
        *_, (tokens, _) = self.mask_states(features, masks.sigmoid() if from_logits else masks)
        return self.head(tokens)

    def mask_bias(self, masks: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """The bias of each block with mask tokens, first to last: masks (N, Q, H, W) -> (N, heads or 1, Q, h * w)."""
        masks = downsample_masks(masks, grid)
        if self.mask_mode == "maft":
            return [hard_mask_bias(masks)] * (len(self.blocks) - self.start_layer)
        return [soft_mask_bias(masks, log_scale) for log_scale in self.mask_logit_scale.flip(0)]

    def mask_states(
        self, features: ClipFeatures, masks: Tensor, *, finish_image: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """After each block with mask tokens: the mask tokens (N, Q, C) and the image's tokens (N, L or 1 + L, C).

        ``finish_image``: take the image's tokens through the last block, too, which the mask tokens do not need.
        """
        image = features.tokens
        tokens = image[:, :1].expand(-1, masks.shape[1], -1)
        if self.mask_mode == "maft":
            image = image[:, 1:]
        rotation = self.rotation(features.grid)
        for index, bias in enumerate(self.mask_bias(masks, features.grid), start=self.start_layer):
            with_image = finish_image or index < len(self.blocks) - 1
            tokens, image = self._run(self._mask_block, index, tokens, image, bias, rotation, with_image)
            yield tokens, image

    def _mask_block(
        self, index: int, tokens: Tensor, image: Tensor, bias: Tensor, rotation: Tensor | None, with_image: bool
    ) -> tuple[Tensor, Tensor]:
        query, key, value = self.project(index, image, rotation)
        own_query, *own = self.project(index, tokens, None)
        num_patches = bias.shape[-1]
        heads = attend_masked(
            own_query,
            key[:, :, -num_patches:],
            value[:, :, -num_patches:],
            bias,
            own=tuple(own) if self.mask_mode == "maft" else None,
        )
        tokens = tokens + self.attention_update(index, heads)
        tokens = tokens + self.mlp_update(index, tokens)
        if with_image:
            image = image + self.attention_update(index, F.scaled_dot_product_attention(query, key, value))
            image = image + self.mlp_update(index, image)
        return tokens, image

    # ---- small helpers

    def _run(self, function: Callable, *args: object) -> Tensor:
        """Call, recomputing in the backward pass if that is asked for."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    @staticmethod
    def _patches(x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(N, ... + h * w, C) -> (N, h * w, C)."""
        return x[:, -grid[0] * grid[1] :]

    @staticmethod
    def _to_map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(N, h * w, C) -> (N, C, h, w)."""
        return patches.transpose(1, 2).unflatten(2, grid)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(N, L, C) -> (N, heads, L, C / heads)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(heads: Tensor) -> Tensor:
    """(N, heads, L, C / heads) -> (N, L, C)."""
    return heads.transpose(1, 2).flatten(2)
