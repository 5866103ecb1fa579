"""The network that says what belongs together in ProxyCLIP: a vision transformer of timm."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.checkpoint.io import read_state_dict
from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from ovseg_d2.modeling.clip.proxy_attention import proxy_attention

_KEY = "MODEL.OVSEG.TRAINING_FREE.PROXY"
#: Of ``PRETRAINED``: what timm has for the name.
TIMM = "timm"


class ProxyModel(nn.Module):
    """CLIP's images -> the attention of their positions, by the features of a frozen network."""

    def __init__(self, *, name: str, beta: float = 1.2, gamma: float = 3.0) -> None:
        """
        Args:
            name: of a vision transformer in timm; weights are random.
            beta, gamma: see :func:`proxy_attention`.

        Raises:
            ValueError: no such model, or no transformer on patches.
        """
        super().__init__()
        if not timm.is_model(name):
            raise ValueError(
                f"{_KEY}.NAME: timm has no model {name!r}; expected a vision transformer, as vit_base_patch16_224.dino"
            )
        try:
            self.model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
        except TypeError as error:
            raise ValueError(f"{_KEY}.NAME: {name} is no vision transformer that takes images of any size") from error
        self.name, self.beta, self.gamma = name, beta, gamma
        self.patch_size: tuple[int, int] = tuple(self.model.patch_embed.patch_size)
        mean, std = (self.model.pretrained_cfg[key] for key in ("mean", "std"))
        clip_mean, clip_std, mean, std = (
            torch.tensor(values).view(-1, 1, 1)
            for values in (CLIP_PIXEL_MEAN, CLIP_PIXEL_STD, [255 * x for x in mean], [255 * x for x in std])
        )
        self.register_buffer("scale", clip_std / std, persistent=False)
        self.register_buffer("shift", (clip_mean - mean) / std, persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> ProxyModel:
        options = cfg.MODEL.OVSEG.TRAINING_FREE.PROXY
        return cls(name=options.NAME, beta=options.BETA, gamma=options.GAMMA)

    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """
        Args:
            images: (N, 3, H, W) normalised as CLIP wants them.
            grid: (h, w) of CLIP.

        Returns:
            (N, L, L), L = h * w.
        """
        return proxy_attention(self.features(images), grid, beta=self.beta, gamma=self.gamma)

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) as in :meth:`forward` -> the patches after the last norm, (N, C, h', w')."""
        images = images * self.scale + self.shift
        size = [max(round(n / patch), 1) * patch for n, patch in zip(images.shape[-2:], self.patch_size, strict=True)]
        if size != list(images.shape[-2:]):
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        return self.model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[0]


def load_proxy_pretrained(proxy: ProxyModel, pretrained: str) -> str:
    """Fill a proxy with weights: those that timm has for its name, or a file with timm's or DINO's names (the same).

    Returns:
        A line for the log.

    Raises:
        ValueError: there are none, they cannot be fetched, or they are of another architecture.
    """
    key = f"{_KEY}.PRETRAINED"
    if pretrained == TIMM:
        weights = _timm_weights(proxy.name)
    elif Path(pretrained).expanduser().is_file():
        weights = read_state_dict(Path(pretrained).expanduser())
    else:
        raise ValueError(f"{key}: the file {pretrained!r} does not exist; expected a file, or {TIMM!r}")
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(("head.", "fc."))}
    own = proxy.model.state_dict()
    wrong = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    wrong += [name for name in weights if name not in own]
    if wrong:
        raise ValueError(
            f"{key}: {pretrained} does not fit {proxy.name}: {len(wrong)} tensors are missing, of another shape or "
            f"unknown, for example {wrong[0]}"
        )
    proxy.model.load_state_dict(weights)
    return f"{key}: {len(weights)} tensors of {proxy.name} from {pretrained}"


def _timm_weights(name: str) -> dict[str, Tensor]:
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # whatever the network, the server or the disk did
        raise ValueError(
            f"{_KEY}.PRETRAINED: timm's weights of {name} are not cached and could not be fetched "
            f"({type(error).__name__}); fetch them where there is a network, and set the key to the file"
        ) from error
