"""Convolutions whose kernels texts generate, one a class and image (FGA-seg, sections III-B.2 and III-C.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TextKernels(nn.Linear):
    """Makes a kernel and a bias of every text."""

    def __init__(self, *, dim: int, channels: int, kernel_size: int) -> None:
        """
        Args:
            dim: D, of the texts.
            channels: C, of the features that the kernels see.
            kernel_size: side of the kernels.

        Raises:
            ValueError: an even or non-positive kernel size, with which the maps would not keep their size.
        """
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"MODEL.OVSEG.FGA_SEG.KERNEL_SIZE is {kernel_size}; expected an odd positive number")
        super().__init__(dim, channels * kernel_size**2 + 1)
        self.kernel_shape = (channels, kernel_size, kernel_size)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(N, E, D) -> kernels (N, E, C, size, size) and biases (N, E)."""
        rows = super().forward(text)
        return rows[..., :-1].unflatten(-1, self.kernel_shape), rows[..., -1]


def text_convolution(features: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """Convolve every image with its own kernels, zeros around it.

    One convolution an image: a grouped one over the batch takes 1.2 to 3 times as long on CPUs, forward and backward.

    Args:
        features: (N, C, h, w).
        kernels: (N, E, C, size, size), size odd.
        bias: (N, E).

    Returns:
        (N, E, h, w).
    """
    padding = kernels.shape[-1] // 2
    images = zip(features, kernels, bias, strict=True)
    return torch.stack([F.conv2d(image, kernel, b, padding=padding) for image, kernel, b in images])


def mean_prompt(text: Tensor) -> Tensor:
    """Texts (N, E, P, D) -> (N, E, D), the mean of a class's prompts; the public code has one prompt a class."""
    return torch.mean(text, dim=2)
