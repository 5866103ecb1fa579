"""Attention windows of feature maps and the cyclic shift between them (Swin, arXiv 2103.14030, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Added to the attention logits of tokens that are neighbours in a window only because of the cyclic shift; the public
# models use this number rather than -inf.
SHIFT_MASK = -100.0


def to_windows(x: Tensor, *, window_size: int, shift: int = 0) -> Tensor:
    """Pad at the right and the bottom to whole windows, shift cyclically, cut.

    Args:
        x: (N, h, w, C).
        window_size: side of a window, in tokens.
        shift: by how many tokens the map moves up and to the left.

    Returns:
        (N * windows, L, C), the windows of one map after each other.
    """
    x = F.pad(x, (0, 0, 0, -x.shape[2] % window_size, 0, -x.shape[1] % window_size))
    if shift:
        x = x.roll((-shift, -shift), dims=(1, 2))
    windows = x.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size)).transpose(2, 3)
    return windows.flatten(0, 2).flatten(1, 2)


def from_windows(windows: Tensor, size: tuple[int, int], *, window_size: int, shift: int = 0) -> Tensor:
    """Undo :func:`to_windows`: (N * windows, L, C) -> (N, *size, C)."""
    grid = tuple(-(-length // window_size) for length in size)
    x = windows.unflatten(1, (window_size, window_size)).unflatten(0, (-1, *grid)).transpose(2, 3)
    x = x.flatten(3, 4).flatten(1, 2)
    if shift:
        x = x.roll((shift, shift), dims=(1, 2))
    return x[:, : size[0], : size[1]]


def window_mask(
    size: tuple[int, int], *, window_size: int, shift: int, hide_padding: bool = False, device: torch.device
) -> Tensor | None:
    """What attention within windows adds to its logits.

    After the cyclic shift, the last row and column of windows hold tokens from opposite borders: they may attend only
    to tokens from their own region (figure 4).

    Args:
        size: (h, w) of the map before padding.
        window_size, shift: as for :func:`to_windows`.
        hide_padding: make the padding a region of its own, which real tokens do not see.

    Returns:
        (windows, L, L): 0 for tokens of one region, ``SHIFT_MASK`` for others; None if there is one region alone.
    """
    if not shift and not (hide_padding and any(length % window_size for length in size)):
        return None

    def regions(length: int) -> Tensor:  # (windows, window) ids: inside, last window, wrapped around, padding
        padded = length + -length % window_size
        position = torch.arange(padded, device=device)
        ids = torch.zeros_like(position)
        if shift:
            ids = (position >= padded - window_size).int() + (position >= padded - shift).int()
        if hide_padding:
            ids = ids.masked_fill((position + shift) % padded >= length, 3)
        return ids.view(-1, window_size)

    rows, columns = regions(size[0]), regions(size[1])
    ids = 4 * rows[:, None, :, None] + columns[None, :, None, :]  # (window rows, window columns, window, window)
    ids = ids.flatten(0, 1).flatten(1)
    return torch.zeros(1, device=device).where(ids[:, :, None] == ids[:, None, :], SHIFT_MASK)
