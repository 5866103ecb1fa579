"""Pixel decoder of MaskFormer (arXiv 2107.06278, section 3.3): a feature pyramid with a map of every stride."""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.proposals.pixel_decoder import PixelFeatures


class FPNPixelDecoder(nn.Module):
    """Backbone features to per-pixel mask embeddings at the stride of the finest feature."""

    def __init__(self, *, input_shape: Mapping[str, ShapeSpec], dim: int, mask_dim: int, norm: str) -> None:
        """
        Args:
            input_shape: channels and stride of each backbone feature to be used.
            norm: normalisation of the convolutions (detectron2's names); "" for none.
        """
        super().__init__()
        # Finest first, as in public checkpoints.
        self.features = sorted(input_shape, key=lambda name: input_shape[name].stride)
        bias = norm == ""
        self.lateral = nn.ModuleList(
            Conv2d(input_shape[name].channels, dim, kernel_size=1, bias=bias, norm=get_norm(norm, dim))
            for name in self.features[:-1]
        )
        # The coarsest feature has no lateral convolution: its output convolution takes it as it is.
        in_dims = [dim] * len(self.lateral) + [input_shape[self.features[-1]].channels]
        self.output = nn.ModuleList(
            Conv2d(in_dim, dim, kernel_size=3, padding=1, bias=bias, norm=get_norm(norm, dim), activation=F.relu)
            for in_dim in in_dims
        )
        self.mask_features = nn.Conv2d(dim, mask_dim, 3, padding=1)
        for conv in (*self.lateral, *self.output, self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, features: Mapping[str, Tensor]) -> PixelFeatures:
        """
        Args:
            features: name -> (N, C, h, w), at least those of ``input_shape``.

        Returns:
            ``multi_scale``: the pyramid's maps (N, dim, h_i, w_i), coarsest first.
        """
        maps = [self.output[-1](features[self.features[-1]])]
        for i in reversed(range(len(self.lateral))):
            y = self.lateral[i](features[self.features[i]])
            y = y + F.interpolate(maps[-1], size=y.shape[-2:], mode="nearest")
            maps.append(self.output[i](y))
        return PixelFeatures(mask_features=self.mask_features(maps[-1]), multi_scale=maps)
