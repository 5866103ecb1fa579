"""ProxyCLIP (arXiv 2408.04883, section 3.3): who attends to whom in CLIP's last block is what another network says.

Features of a self-supervised network (DINO) tell what belongs together better than CLIP's own queries and keys do;
CLIP's values tell what it is. The equation and both constants are written down from memory of the paper, not from its
code: ``gamma`` (S - ``beta`` mean(S)), with ``beta`` 1.2 and ``gamma`` 3.0. Where the two grids differ, features are
resized to CLIP's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def proxy_attention(features: Tensor, grid: tuple[int, int], *, beta: float = 1.2, gamma: float = 3.0) -> Tensor:
    """Attention between positions: a softmax of cosines, of those above ``beta`` times the image's mean cosine.

    A position attends to itself in any case; otherwise an image of one colour would leave nothing to attend to.

    Args:
        features: (N, C, h', w') of the other network.
        grid: (h, w) of CLIP, L = h * w.
        beta: above which multiple of the mean two positions belong together.
        gamma: inverse temperature.

    Returns:
        (N, L, L), rows that sum to one.
    """
    features = F.interpolate(features.float(), size=grid, mode="bilinear", align_corners=False)
    features = F.normalize(features.flatten(2), dim=1)
    cosines = features.mT @ features
    logits = gamma * (cosines - beta * cosines.mean(dim=(-2, -1), keepdim=True))
    itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    return logits.masked_fill((logits < 0) & ~itself, float("-inf")).softmax(dim=-1)
