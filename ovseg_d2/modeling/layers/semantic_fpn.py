"""Semantic FPN (Panoptic FPN, arXiv 1901.02446, section 3): backbone maps to one map of class logits."""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from torch import Tensor, nn
from torch.nn import functional as F


class SemanticFPN(nn.Module):
    """A feature pyramid without norms (arXiv 1612.03144), whose maps go to the finest stride and are added.

    The sizes of the maps must be those of their strides: each twice the next.
    """

    def __init__(
        self, *, input_shape: Mapping[str, ShapeSpec], num_classes: int, dim: int, norm: str, dropout: float
    ) -> None:
        """
        Args:
            input_shape: channels and stride of each map.
            dim: width of the pyramid and of what follows; DenseCLIP has 256 for both.
            norm: detectron2's name of the normalisation behind the pyramid.
            dropout: share of the channels that are dropped before the classifier.
        """
        super().__init__()
        # Finest first, as in public checkpoints.
        self.features = sorted(input_shape, key=lambda name: input_shape[name].stride)
        self.lateral = nn.ModuleList(Conv2d(input_shape[name].channels, dim, kernel_size=1) for name in self.features)
        self.output = nn.ModuleList(Conv2d(dim, dim, kernel_size=3, padding=1) for _ in self.features)
        for conv in (*self.lateral, *self.output):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        strides = {name: input_shape[name].stride for name in self.features}
        self.head = SemSegFPNHead(
            {name: ShapeSpec(channels=dim, stride=stride) for name, stride in strides.items()},
            num_classes=num_classes,
            conv_dims=dim,
            common_stride=min(strides.values()),
            norm=norm,
        )
        self.head.predictor = nn.Sequential(nn.Dropout2d(dropout), self.head.predictor)

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Maps (N, C_i, h_i, w_i) by name -> logits (N, K, h, w) at the finest stride."""
        pyramid: dict[str, Tensor] = {}
        above = None
        for i in reversed(range(len(self.features))):
            name = self.features[i]
            y = self.lateral[i](maps[name])
            above = y if above is None else y + F.interpolate(above, size=y.shape[-2:], mode="nearest")
            pyramid[name] = self.output[i](above)
        return self.head.layers(pyramid)
