"""CLIP's own copy of an image: normalised, resized, padded (MaskCLIP++); masks follow it."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.structures import ImageList
from torch import Tensor
from torch.nn import functional as F

from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from ovseg_d2.structures import ImageBatch

RESIZE_MODES = ("none", "short", "square")


def resized_size(size: tuple[int, int], resize: str, input_size: int) -> tuple[int, int]:
    """(height, width) after resizing.

    Args:
        resize: ``MODEL.OVSEG.CLIP.RESIZE``. "none"; "short": the shorter side becomes ``input_size``, the longer one
            keeps the shape, rounded down; "square": both become ``input_size``.
        input_size: ``MODEL.OVSEG.CLIP.INPUT_SIZE`` in pixels; unused with "none".

    Raises:
        ValueError: an unknown mode, or no positive size where one is needed.
    """
    if resize not in RESIZE_MODES:
        raise ValueError(f"MODEL.OVSEG.CLIP.RESIZE: {resize!r}; expected one of {', '.join(RESIZE_MODES)}")
    if resize == "none":
        return size
    if input_size <= 0:
        raise ValueError(f"MODEL.OVSEG.CLIP.INPUT_SIZE: {input_size}; expected pixels, as RESIZE is {resize!r}")
    if resize == "square":
        return input_size, input_size
    height, width = size
    if height < width:
        return input_size, int(width * input_size / height)
    return int(height * input_size / width), input_size


def normalise_image(
    image: Tensor, mean: Sequence[float] = CLIP_PIXEL_MEAN, std: Sequence[float] = CLIP_PIXEL_STD
) -> Tensor:
    """(3, H, W) RGB, 0 to 255, any dtype -> float, with CLIP's mean and deviation."""
    image = image.float()
    return (image - image.new_tensor(mean).view(-1, 1, 1)) / image.new_tensor(std).view(-1, 1, 1)


def resize_and_pad(
    images: Sequence[Tensor],
    *,
    resize: str = "none",
    input_size: int = 0,
    size_divisibility: int = 32,
    image_ids: Sequence[int | str] | None = None,
) -> ImageBatch:
    """One batch of normalised images (3, H, W), without padding, of any sizes.

    Args:
        resize, input_size: see :func:`resized_size`; bilinear, without antialiasing.
        size_divisibility: height and width of the batch become multiples of it; 0 for no more than a common size.
        image_ids: of the batch; the index of each image by default.
    """
    sizes = [resized_size((image.shape[-2], image.shape[-1]), resize, input_size) for image in images]
    resized = [_resized(image[None], size)[0] for image, size in zip(images, sizes, strict=True)]
    return ImageBatch(
        tensor=ImageList.from_tensors(resized, size_divisibility).tensor,
        image_sizes=sizes,
        image_ids=list(range(len(images)) if image_ids is None else image_ids),
    )


def resize_image_batch(
    images: ImageBatch, *, resize: str = "none", input_size: int = 0, size_divisibility: int = 32
) -> ImageBatch:
    """Another size for images that are a batch already: their padding is cut off, and made anew after resizing."""
    cropped = [image[:, :h, :w] for image, (h, w) in zip(images.tensor, images.image_sizes, strict=True)]
    return resize_and_pad(
        cropped,
        resize=resize,
        input_size=input_size,
        size_divisibility=size_divisibility,
        image_ids=images.image_ids,
    )


def resize_masks(masks: Tensor, image_size: tuple[int, int], padded_size: tuple[int, int]) -> Tensor:
    """Bring masks on the frame of :func:`resize_and_pad`'s batch.

    Args:
        masks: (Q, H, W) float in [0, 1] on an image without padding, at any resolution; Q may be 0.
        image_size: (height, width) of that image in the batch, without padding.
        padded_size: of the batch.

    Returns:
        (Q, *padded_size), zero in the padding.
    """
    masks = _resized(masks[:, None], image_size)[:, 0]
    return F.pad(masks, (0, padded_size[1] - image_size[1], 0, padded_size[0] - image_size[0]))


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) -> (N, C, *size)."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
