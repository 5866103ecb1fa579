"""Training augmentations, and the way label maps go through detectron2's transforms (Mask2Former, section 4.1)."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import CropTransform, PadTransform, Transform, TransformList

Array = np.ndarray

#: Value of padded image pixels.
IMAGE_PAD_VALUE = 128
#: Padding of label images writes bytes of this value, never a class: detectron2 0.5's own crop pads with class 0.
LABEL_PAD_BYTE = 255
_PAD_ID = 0xFFFFFF  # three such bytes


def encode_rgb_ids(ids: Array) -> Array:
    """Ids (H, W) in [0, 2**24) -> COCO's panoptic colour code (H, W, 3) uint8."""
    ids = ids.astype(np.int32, copy=False)
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)


def decode_rgb_ids(rgb: Array) -> Array:
    """COCO's panoptic colour code (H, W, 3) uint8 -> ids R + 256 G + 65536 B, (H, W) int32."""
    rgb = rgb.astype(np.int32)
    return rgb[..., 0] + (rgb[..., 1] << 8) + (rgb[..., 2] << 16)


def transform_labels(labels: Array, transforms: TransformList, *, fill: int) -> Array:
    """Apply geometric transforms to a label map, by nearest neighbour.

    Labels travel as bytes: detectron2 resizes uint8 with Pillow, whose nearest neighbour samples pixel centres as
    the image's bilinear resize does; other types go to torch, whose grid is shifted by up to half a pixel (and wide
    integers fail).

    Args:
        labels: (H, W) integers in [0, 2**24 - 1).
        transforms: made for an image of that size.
        fill: label of padded pixels.

    Returns:
        (H', W') uint8 when all labels are below 255, else int32.
    """
    if labels.max(initial=0) < LABEL_PAD_BYTE:
        out = np.array(transforms.apply_segmentation(labels.astype(np.uint8, copy=False)))
        out[out == LABEL_PAD_BYTE] = fill
    else:
        out = decode_rgb_ids(np.asarray(transforms.apply_segmentation(encode_rgb_ids(labels))))
        out[out == _PAD_ID] = fill
    return out


def transform_masks(masks: Array, transforms: TransformList) -> Array:
    """Apply geometric transforms to masks that may overlap (Q, H, W): (Q, H', W') bool, False in the padding."""
    bits = 23  # that many masks travel as the bits of one label map
    groups = [masks[first : first + bits].astype(np.int32) for first in range(0, len(masks), bits)]
    if not groups:
        groups = [np.zeros((0, *masks.shape[1:]), np.int32)]
    moved = []
    for group in groups:
        places = np.arange(len(group), dtype=np.int32)[:, None, None]
        labels = transform_labels((group << places).sum(axis=0, dtype=np.int32), transforms, fill=0)
        moved.append((labels.astype(np.int32)[None] >> places & 1).astype(bool))
    return np.concatenate(moved)


class FixedSizeCrop(T.Augmentation):
    """Random crop of at most ``size``, then padding at the right and the bottom to exactly ``size``.

    One random number sets the offsets of both axes, as in the public large-scale jitter.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size  # height, width

    def get_transform(self, image: Array) -> Transform:
        height, width = image.shape[:2]
        fraction = np.random.uniform(0.0, 1.0)
        top = int(round(max(height - self.size[0], 0) * fraction))
        left = int(round(max(width - self.size[1], 0) * fraction))
        crop_height, crop_width = min(height, self.size[0]), min(width, self.size[1])
        crop = CropTransform(left, top, crop_width, crop_height)
        return TransformList([crop, _pad_transform(crop_height, crop_width, self.size)])


class PadToSize(T.Augmentation):
    """Padding at the right and the bottom to exactly ``size``; a larger image is an error of the configuration."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size  # height, width

    def get_transform(self, image: Array) -> Transform:
        height, width = image.shape[:2]
        if height > self.size[0] or width > self.size[1]:
            raise ValueError(
                f"INPUT.PAD_SIZE is {self.size[0]} but an image is {height} x {width} after the crop; "
                "expected INPUT.CROP.SIZE no larger than PAD_SIZE, with INPUT.CROP.ENABLED"
            )
        return _pad_transform(height, width, self.size)


def _pad_transform(height: int, width: int, size: tuple[int, int]) -> PadTransform:
    return PadTransform(
        0, 0, size[1] - width, size[0] - height, width, height, IMAGE_PAD_VALUE, seg_pad_value=LABEL_PAD_BYTE
    )


class SSDColorJitter(T.Augmentation):
    """Brightness, contrast, saturation and hue, each with probability 1/2 (SSD, Liu et al. 2016).

    Brightness changes by up to 32, contrast and saturation by a factor of 0.5 to 1.5, the hue by up to 18 of OpenCV's
    180 units; contrast comes before or after the colour changes with equal probability.
    """

    def __init__(self, image_format: str) -> None:
        super().__init__()
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT is {image_format!r}; colour augmentation expects RGB or BGR")
        self.image_format = image_format

    def get_transform(self, image: Array) -> Transform:
        def maybe(low: float, high: float, otherwise: float) -> float:
            return np.random.uniform(low, high) if np.random.rand() < 0.5 else otherwise

        brightness = maybe(-32, 32, 0.0)
        contrast_first = np.random.rand() < 0.5
        contrast = maybe(0.5, 1.5, 1.0)
        saturation = maybe(0.5, 1.5, 1.0)
        hue = int(maybe(-18, 18, 0.0))

        def jitter(image: Array) -> Array:
            image = _scale(image, 1.0, brightness)
            if contrast_first:
                image = _scale(image, contrast, 0.0)
            image = _shift_colour(image, saturation, hue, self.image_format)
            return image if contrast_first else _scale(image, contrast, 0.0)

        return T.ColorTransform(jitter)


def _table(factor: float, offset: float) -> Array:
    return np.clip(np.arange(256) * factor + offset, 0, 255).astype(np.uint8)


def _scale(image: Array, factor: float, offset: float) -> Array:
    return image if factor == 1.0 and offset == 0.0 else cv2.LUT(np.ascontiguousarray(image), _table(factor, offset))


def _shift_colour(image: Array, saturation: float, hue: int, image_format: str) -> Array:
    if saturation == 1.0 and hue == 0:
        return image
    to_hsv, from_hsv = (
        (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB) if image_format == "RGB" else (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR)
    )
    hsv = cv2.cvtColor(np.ascontiguousarray(image), to_hsv)
    hues = ((np.arange(256) + hue) % 180).astype(np.uint8)
    hsv = cv2.LUT(hsv, np.stack([hues, _table(saturation, 0.0), _table(1.0, 0.0)], axis=-1)[None])
    return cv2.cvtColor(hsv, from_hsv)


def build_augmentations(cfg: Any) -> list[T.Augmentation]:
    """The training pipeline that ``INPUT.PIPELINE`` names.

    ``lsj``: flip, scale jitter, square crop and padding. ``crop``: shortest edge, crop, colour, flip, padding.
    ``resize``: shortest edge, flip.
    """
    pipelines = {"lsj": _lsj_pipeline, "crop": _crop_pipeline, "resize": _resize_pipeline}
    if cfg.INPUT.PIPELINE not in pipelines:
        raise ValueError(f"INPUT.PIPELINE is {cfg.INPUT.PIPELINE!r}; expected one of {', '.join(pipelines)}")
    return pipelines[cfg.INPUT.PIPELINE](cfg)


def build_test_augmentations(cfg: Any) -> list[T.Augmentation]:
    """Shortest edge to ``INPUT.MIN_SIZE_TEST`` (0: the original size), longest at most ``INPUT.MAX_SIZE_TEST``."""
    return [T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")]


def _lsj_pipeline(cfg: Any) -> list[T.Augmentation]:
    size = cfg.INPUT.IMAGE_SIZE
    scale = T.ResizeScale(cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, size, size)
    return [*_color(cfg), *_flip(cfg), scale, FixedSizeCrop((size, size))]


def _crop_pipeline(cfg: Any) -> list[T.Augmentation]:
    crop = cfg.INPUT.CROP
    augmentations = [_shortest_edge(cfg)]
    if crop.ENABLED:
        augmentations.append(
            T.RandomCrop_CategoryAreaConstraint(
                crop.TYPE, crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
            )
        )
    augmentations += [*_color(cfg), *_flip(cfg)]
    if cfg.INPUT.PAD_SIZE > 0:
        augmentations.append(PadToSize((cfg.INPUT.PAD_SIZE, cfg.INPUT.PAD_SIZE)))
    return augmentations


def _resize_pipeline(cfg: Any) -> list[T.Augmentation]:
    return [_shortest_edge(cfg), *_color(cfg), *_flip(cfg)]


def _shortest_edge(cfg: Any) -> T.Augmentation:
    return T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING)


def _color(cfg: Any) -> list[T.Augmentation]:
    return [SSDColorJitter(cfg.INPUT.FORMAT)] if cfg.INPUT.COLOR_AUG_SSD else []


def _flip(cfg: Any) -> list[T.Augmentation]:
    direction = cfg.INPUT.RANDOM_FLIP
    if direction == "none":
        return []
    if direction not in ("horizontal", "vertical"):
        raise ValueError(f"INPUT.RANDOM_FLIP is {direction!r}; expected none, horizontal or vertical")
    return [T.RandomFlip(horizontal=direction == "horizontal", vertical=direction == "vertical")]
