"""COCO-panoptic PNG files: a segment id is R + 256 G + 65536 B."""

from pathlib import Path

import numpy as np
from PIL import Image

from ovseg_d2.data.augmentation import decode_rgb_ids, encode_rgb_ids
from ovseg_d2.data.image_io import read_image


def read_panoptic_png(path: str | Path) -> np.ndarray:
    """Segment ids (H, W) int32 of a COCO-panoptic PNG.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an RGB image.
    """
    rgb = read_image(str(path))
    if rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"{path}: a panoptic PNG has 3 channels, found an image of shape {rgb.shape}")
    return decode_rgb_ids(rgb)


def write_panoptic_png(path: str | Path, ids: np.ndarray) -> None:
    """Writes segment ids (H, W) as a COCO-panoptic PNG."""
    Image.fromarray(encode_rgb_ids(ids)).save(path)
