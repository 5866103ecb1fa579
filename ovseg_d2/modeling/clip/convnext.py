"""ConvNeXt image towers of open_clip (timm's ConvNeXt with a projection), as FC-CLIP and MaskCLIP++ use them."""

from __future__ import annotations

import torch
from detectron2.layers import ShapeSpec
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ovseg_d2.modeling.clip.image_encoder import ClipImageEncoder, check_option
from ovseg_d2.modeling.layers.mask_pooling import pool_binary, pool_soft
from ovseg_d2.structures import ClipFeatures


class ClipConvNeXt(ClipImageEncoder):
    """Layers ``stem`` (stride 4) and ``res2`` to ``res5``. A region is the mean of ``res5`` in its mask, which then
    goes through the tower's norm and projection like the mean of a whole image."""

    def __init__(
        self, tower: nn.Module, *, dense: bool = False, mask_pooling: str = "hard", use_checkpoint: bool = False
    ) -> None:
        """
        Args:
            tower: open_clip's ``TimmModel``: ``trunk`` (a timm ConvNeXt without classifier) and ``head``.
            dense: whether :meth:`forward` projects every position, too.
            mask_pooling: "hard": mean over the positions inside (FC-CLIP); "soft": mean weighted by the mask
                (MaskCLIP++).
        """
        super().__init__(tower, use_checkpoint=use_checkpoint)
        assert isinstance(tower.trunk, ConvNeXt), type(tower.trunk)
        check_option("mask_pooling", mask_pooling, ("hard", "soft"))
        self.dense = dense
        self.mask_pooling = mask_pooling
        self._embed_dim = _output_dim(tower)

    @property
    def embed_dim(self) -> int:
        return self._embed_dim

    def output_shape(self) -> dict[str, ShapeSpec]:
        stages = self.tower.trunk.feature_info
        shapes = {"stem": ShapeSpec(channels=stages[0]["num_chs"], stride=stages[0]["reduction"])}
        for i, stage in enumerate(stages):
            shapes[f"res{i + 2}"] = ShapeSpec(channels=stage["num_chs"], stride=stage["reduction"])
        return shapes

    def forward(self, images: Tensor, *, masks_only: bool = False) -> ClipFeatures:
        trunk = self.tower.trunk
        recompute = self.use_checkpoint and torch.is_grad_enabled()
        x = trunk.stem(images)
        layers = {"stem": x}
        for i, stage in enumerate(trunk.stages):
            x = stage.downsample(x)
            for block in stage.blocks:
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            layers[f"res{i + 2}"] = x
        grid = (x.shape[-2], x.shape[-1])
        if masks_only:
            return ClipFeatures(image_embeds=None, dense=None, layers=layers, grid=grid)
        last = trunk.norm_pre(x)
        dense = self.project(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.dense else None
        return ClipFeatures(
            image_embeds=self.project(last.mean(dim=(-2, -1))),
            dense=dense,
            layers=layers,
            grid=grid,
        )

    def encode_masks(self, features: ClipFeatures, masks: Tensor, *, from_logits: bool = False) -> Tensor:
        last = self.tower.trunk.norm_pre(features.layers["res5"])
        if self.mask_pooling == "soft":
            pooled = pool_soft(last, masks.sigmoid() if from_logits else masks)
        else:
            pooled = pool_binary(last, masks if from_logits else masks - 0.5)
        return self.project(pooled)

    def project(self, pooled: Tensor) -> Tensor:
        """Means of the last map (..., C) -> embeddings (..., D)."""
        # The head takes maps; of one position here, so that its own pooling changes nothing.
        x = self.tower.trunk.forward_head(pooled.reshape(-1, pooled.shape[-1], 1, 1))
        return self.tower.head(x.flatten(1)).view(*pooled.shape[:-1], self.embed_dim)


def _output_dim(tower: nn.Module) -> int:
    linear = [module for module in tower.head.modules() if isinstance(module, nn.Linear)]
    return linear[-1].out_features if linear else tower.trunk.head.fc.out_features
