"""SegFormer's Mix Transformer as a detectron2 backbone (arXiv 2105.15203, section 3.1), from ``transformers``.

MTA-CLIP's Table 3 has MiT-B4.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from ovseg_d2.modeling.backbones.pretrained import PretrainedBackbone
from ovseg_d2.modeling.layers.hub_model import check_model_folder, load_hub_weights, require_transformers

_KEY = "MODEL.MIT.NAME"
#: The public models: layers of the four stages, and their widths (section A of the paper).
PUBLIC: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "nvidia/mit-b0": ((2, 2, 2, 2), (32, 64, 160, 256)),
    "nvidia/mit-b1": ((2, 2, 2, 2), (64, 128, 320, 512)),
    "nvidia/mit-b2": ((3, 4, 6, 3), (64, 128, 320, 512)),
    "nvidia/mit-b3": ((3, 4, 18, 3), (64, 128, 320, 512)),
    "nvidia/mit-b4": ((3, 8, 27, 3), (64, 128, 320, 512)),
    "nvidia/mit-b5": ((3, 6, 40, 3), (64, 128, 320, 512)),
}
NAMES = ("res2", "res3", "res4", "res5")


@BACKBONE_REGISTRY.register()
class MixTransformer(PretrainedBackbone):
    """Maps ``res2`` to ``res5`` of strides 4 to 32, each after its stage's norm."""

    weights_key = _KEY

    @configurable
    def __init__(self, *, segformer: nn.Module, name: str = "") -> None:
        """
        Args:
            segformer: a ``SegformerModel`` of transformers.
            name: of its weights: of a public model, or a folder.
        """
        super().__init__()
        self.segformer = segformer
        self.name = name

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        mit = cfg.MODEL.MIT
        return {"segformer": build_segformer(mit.NAME, drop_path_rate=mit.DROP_PATH_RATE), "name": mit.NAME}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) normalised -> the four maps by name."""
        maps = self.segformer(images, output_hidden_states=True).hidden_states
        return dict(zip(NAMES, maps, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        widths = self.segformer.config.hidden_sizes
        return {name: ShapeSpec(channels=widths[i], stride=4 * 2**i) for i, name in enumerate(NAMES)}

    @property
    def size_divisibility(self) -> int:
        return 32

    @property
    def weights_name(self) -> str:
        return self.name

    def pretrained_names(self) -> list[str]:
        return list(self.state_dict())

    def load_pretrained(self) -> str:
        load_hub_weights(self.segformer, self.name, key=_KEY)
        return f"{_KEY}: the backbone's weights are those of {self.name}"


def build_segformer(name: str, *, drop_path_rate: float) -> nn.Module:
    """A ``SegformerModel`` with random weights; nothing is fetched.

    Args:
        name: of a public model, or a folder with a ``config.json``.
        drop_path_rate: stochastic depth of the last layer; it rises linearly from 0 at the first.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds another model, or transformers is not installed.
    """
    require_transformers("MODEL.BACKBONE.NAME is 'MixTransformer'", "mit")
    from transformers import SegformerConfig, SegformerModel

    if name in PUBLIC:
        depths, widths = PUBLIC[name]
        config = SegformerConfig(depths=depths, hidden_sizes=widths)
    else:
        check_model_folder(name, key=_KEY, kind="segformer", public=PUBLIC)
        config = SegformerConfig.from_pretrained(name, local_files_only=True)
    config.drop_path_rate = drop_path_rate
    return SegformerModel(config)
