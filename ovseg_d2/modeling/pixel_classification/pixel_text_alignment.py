"""FGA-seg (sections III-B and III-C): texts that know the image's pixels, and what compares the two."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.mask_classification.content_transfer import ContentDependentTransfer
from ovseg_d2.modeling.pixel_classification.text_convolution import TextKernels, mean_prompt, text_convolution


class PixelToTextTransformer(nn.Module):
    """P2Tformer: aligned text = text + residual scale * layers(text; pixels) (equations 5 and 6).

    The layers are MAFT+'s content-dependent transfer; what they return has the text itself in it already.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int = 8,
        depth: int = 1,
        residual_scale: float = 0.1,
        train_residual_scale: bool = True,
    ) -> None:
        """
        Args:
            dim: D, of CLIP's joint space; a multiple of 4 and of ``num_heads``.
            num_heads: of the attention.
            depth: number of layers (table III).
            residual_scale: first value of the scale, one a channel.
            train_residual_scale: False keeps that value (table III).

        Raises:
            ValueError: no layer at all, or heads that do not divide the channels.
        """
        super().__init__()
        if depth < 1:
            raise ValueError(f"MODEL.OVSEG.FGA_SEG.P2T_LAYERS is {depth}; expected 1 or more layers of a P2Tformer")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"MODEL.OVSEG.FGA_SEG.P2T_HEADS is {num_heads}; expected a divisor of {dim}, CLIP's width")
        self.layers = transfer_layers(dim=dim, num_heads=num_heads, depth=depth)
        self.residual_scale = nn.Parameter(torch.full((dim,), residual_scale), requires_grad=train_residual_scale)

    def forward(self, dense: Tensor, text: Tensor) -> Tensor:
        """
        Args:
            dense: (N, D, h, w) CLIP's features of the positions, not normalised.
            text: (E, P, D) unit vectors.

        Returns:
            (N, E, P, D) one set of texts an image, not normalised.
        """
        updated = rows = text.flatten(0, 1)
        for layer in self.layers:
            updated = layer(updated, dense)
        return (rows + self.residual_scale * updated).unflatten(1, text.shape[:2])


class DualPixelTextTransformer(PixelToTextTransformer):
    """P2Tformer that aligns the pixels with the texts as well; in the public code, but not used by it."""

    def __init__(self, *, dim: int, num_heads: int = 8, depth: int = 1, residual_scale: float = 0.1) -> None:
        """See :class:`PixelToTextTransformer`."""
        super().__init__(dim=dim, num_heads=num_heads, depth=depth, residual_scale=residual_scale)
        self.pixel_layers = transfer_layers(dim=dim, num_heads=num_heads, depth=depth)
        self.pixel_residual_scale = nn.Parameter(torch.full((dim,), residual_scale))

    def forward(self, dense: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            dense: (N, D, h, w).
            text: (E, P, D) unit vectors.

        Returns:
            Texts (N, E, P, D) and pixels (N, D, h, w), neither normalised.
        """
        texts = rows = text.flatten(0, 1)
        pixels = dense
        for text_layer, pixel_layer in zip(self.layers, self.pixel_layers, strict=True):
            texts = text_layer(texts, pixels)
            flat = pixels.flatten(2).transpose(1, 2)
            position = pixel_layer.position_encoding(pixels).flatten(2).transpose(1, 2).to(flat.dtype)
            flat = pixel_layer.update(flat, query=flat + position, keys=texts, values=texts)
            pixels = flat.transpose(1, 2).unflatten(2, dense.shape[-2:])
        aligned_text = (rows + self.residual_scale * texts).unflatten(1, text.shape[:2])
        return aligned_text, dense + self.pixel_residual_scale[:, None, None] * pixels


def transfer_layers(*, dim: int, num_heads: int, depth: int) -> nn.ModuleList:
    """Layers of a P2Tformer, with its initialisation."""
    layers = nn.ModuleList(ContentDependentTransfer(dim=dim, num_heads=num_heads) for _ in range(depth))
    for layer in layers:
        nn.init.xavier_uniform_(layer.attn.out_proj.weight)
    return layers


class TextToPixelProjection(nn.Module):
    """Class maps at four times the resolution, by kernels that texts generate (equation 7); made for the loss alone."""

    def __init__(self, *, dim: int, kernel_size: int = 3) -> None:
        """
        Args:
            dim: D, of CLIP's joint space; even.
            kernel_size: side of the texts' kernels; 3 in the public code, whatever the local similarity has.

        Raises:
            ValueError: an odd ``dim``, or an even kernel size.
        """
        super().__init__()
        if dim % 2:
            raise ValueError(f"TextToPixelProjection: dim is {dim}; expected an even number, as it is halved")
        half = dim // 2
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, half, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(half)
        self.out = nn.Conv2d(half, half, 1)
        self.text_kernels = TextKernels(dim=dim, channels=half, kernel_size=kernel_size)

    def project(self, dense: Tensor) -> Tensor:
        """(N, D, h, w) -> (N, D / 2, 4h, 4w)."""
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            dense = F.interpolate(dense, scale_factor=2, mode="bilinear", align_corners=False)
            dense = F.relu(norm(conv(dense)))
        return self.out(dense)

    def forward(self, dense: Tensor, aligned_text: Tensor) -> Tensor:
        """
        Args:
            dense: (N, D, h, w) CLIP's features of the positions, not normalised.
            aligned_text: (N, E, P, D) from :class:`PixelToTextTransformer`.

        Returns:
            Logits (N, E, 4h, 4w).
        """
        return text_convolution(self.project(dense), *self.text_kernels(mean_prompt(aligned_text)))


class GlobalLocalSimilarity(nn.Module):
    """S_g, the cosine of pixels and texts (equation 9); S_l, pixels convolved with kernels of the texts (equation 10).

    A kernel's taps go through a softmax in each channel, and all channels are summed, as in the public code; the paper
    writes a softmax over channels and a depthwise convolution.
    """

    def __init__(self, *, dim: int, kernel_size: int | None = 3, normalise_kernels: bool = True) -> None:
        """
        Args:
            dim: D, of CLIP's joint space.
            kernel_size: side of the texts' kernels, odd (table IV a); None: no local similarity, as in CAT-Seg.
            normalise_kernels: False leaves the softmax out (table IV b).

        Raises:
            ValueError: an even kernel size.
        """
        super().__init__()
        self.text_kernels = None if kernel_size is None else TextKernels(dim=dim, channels=dim, kernel_size=kernel_size)
        self.normalise_kernels = normalise_kernels

    def forward(self, dense: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            dense: (N, D, h, w) CLIP's features of the positions.
            text: (N, E, P, D), or (1, E, P, D) where all images have the same.

        Returns:
            Global similarity (N, P, E, h, w) and local similarity (N, E, h, w), the latter None if there is none.
        """
        return self.global_similarity(dense, text), self.local_similarity(dense, text)

    def global_similarity(self, dense: Tensor, text: Tensor) -> Tensor:
        """Cosine, float32 under autocast: (N, D, h, w) and (N, E, P, D) -> (N, P, E, h, w)."""
        with torch.autocast(device_type=dense.device.type, enabled=False):
            pixels, texts = F.normalize(dense.float(), dim=1), F.normalize(text.float(), dim=-1)
            return torch.einsum("ndhw,nepd->npehw", pixels, texts.expand(len(dense), -1, -1, -1))

    def local_similarity(self, dense: Tensor, text: Tensor) -> Tensor | None:
        """(N, D, h, w) and (N, E, P, D) -> (N, E, h, w); None if there is none."""
        if self.text_kernels is None:
            return None
        kernels, bias = self.kernels(text.expand(len(dense), -1, -1, -1))
        return text_convolution(F.normalize(dense, dim=1), kernels, bias)

    def kernels(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(N, E, P, D) -> kernels (N, E, D, size, size), whose taps add up to 1 in each channel, and biases (N, E)."""
        kernels, bias = self.text_kernels(F.normalize(mean_prompt(text), dim=-1))
        if self.normalise_kernels:
            kernels = kernels.flatten(-2).softmax(dim=-1).view_as(kernels)
        return kernels, bias
