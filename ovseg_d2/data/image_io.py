"""Reading images and label files, telling a broken file from a missing one."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from detectron2.data import detection_utils
from PIL import Image

Array = np.ndarray

_DECODING_ERRORS = (SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class CorruptImageError(ValueError):
    """An image file that exists but cannot be decoded."""


def read_image(path: str, image_format: str | None = None) -> Array:
    """Decode an image file.

    Args:
        path: the file.
        image_format: RGB, BGR or L; None keeps what the file has (label images).

    Returns:
        (H, W, C) uint8 for RGB and BGR, (H, W) or (H, W, C) of the file's own type for None.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptImageError: the file is not a readable image.
    """
    try:
        return np.array(detection_utils.read_image(path, image_format))  # a writable copy of what Pillow owns
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path} does not exist") from None
    except OSError as error:
        # Pillow's own complaints about a file's content carry no errno; a disk or permission error does.
        if error.errno is not None:
            raise
        raise CorruptImageError(f"image {path} cannot be decoded: {error}") from error
    except _DECODING_ERRORS as error:
        raise CorruptImageError(f"image {path} cannot be decoded: {error}") from error


def check_size(path: str, found: tuple[int, int], expected: tuple[int, int], source: str) -> None:
    """``ValueError`` unless (height, width) ``found`` in ``path`` is what ``source`` says."""
    if found != expected:
        raise ValueError(
            f"{path} is {found[0]} x {found[1]} (height x width), expected {expected[0]} x {expected[1]} as in {source}"
        )


def annotated_size(record: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) that the annotation file gives, if it does."""
    return (record["height"], record["width"]) if "height" in record and "width" in record else None
