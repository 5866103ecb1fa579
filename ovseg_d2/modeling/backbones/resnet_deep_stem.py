"""ResNets whose stem is three 3x3 convolutions (PSPNet, arXiv 1612.01105, section 3; DeepLab): R50c and R101c."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import ResNet, build_resnet_backbone
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor
from torch.nn import functional as F


class DeepStem(CNNBlockBase):
    """Three 3x3 convolutions and a max pooling in place of the 7x7 convolution; names as in detectron2's DeepLab."""

    def __init__(self, *, in_channels: int, out_channels: int, norm: str) -> None:
        """
        Args:
            out_channels: of the last convolution; the first two have half as many.
            norm: detectron2's name of the normalisation.
        """
        super().__init__(in_channels, out_channels, 4)
        dims = [in_channels, out_channels // 2, out_channels // 2, out_channels]
        convs = [
            Conv2d(a, b, 3, stride=2 if i == 0 else 1, padding=1, bias=False, norm=get_norm(norm, b), activation=F.relu)
            for i, (a, b) in enumerate(zip(dims[:-1], dims[1:], strict=True))
        ]
        self.conv1, self.conv2, self.conv3 = convs
        for conv in convs:
            c2_msra_fill(conv)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, H / 4, W / 4)."""
        return F.max_pool2d(self.conv3(self.conv2(self.conv1(x))), kernel_size=3, stride=2, padding=1)


@BACKBONE_REGISTRY.register()
def build_resnet_deep_stem_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """detectron2's ResNet with the other stem; ``MODEL.RESNETS.STEM_OUT_CHANNELS`` is 128 in public models."""
    resnets = cfg.MODEL.RESNETS
    backbone = build_resnet_backbone(cfg, input_shape)
    backbone.stem = DeepStem(
        in_channels=input_shape.channels, out_channels=resnets.STEM_OUT_CHANNELS, norm=resnets.NORM
    )
    if cfg.MODEL.BACKBONE.FREEZE_AT >= 1:
        backbone.stem.freeze()
    return backbone
