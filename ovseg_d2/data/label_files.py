"""Looks into label files: which cannot be read, have another size than their image, or labels outside the table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from ovseg_d2.data.augmentation import decode_rgb_ids
from ovseg_d2.data.image_io import read_image

Array = np.ndarray
#: ``run(function, items)`` -> the results in order; a pool of processes with a progress bar, or plainly ``map``.
Runner = Callable[[Callable, Sequence], Iterable]

_EXIF_ORIENTATION = 0x0112
_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class LabelFile:
    """A label file and what it should hold.

    Args:
        path: the file.
        image: the image of the same size; None: not compared.
        labels: the numbers of classes or segments that may occur.
        ignore_label: label of pixels without a class; None: there is none.
        panoptic: numbers are coded in three channels, as in COCO's panoptic files.
    """

    path: str
    image: str | None
    labels: tuple[int, ...] | range
    ignore_label: int | None
    panoptic: bool = False


def image_size(path: str) -> tuple[int, int]:
    """(height, width) as :func:`read_image` turns the image, from the file's head."""
    with Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) >= 5
    return (width, height) if turned else (height, width)


def describe_labels(labels: Array) -> str:
    """``"labels 200, 201 (12 pixels)"`` of the pixels (n,) that have them."""
    values, counts = np.unique(labels, return_counts=True)
    return describe_counts(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def describe_counts(counts: dict[int, int]) -> str:
    """As :func:`describe_labels`, from the number of pixels of each label."""
    values = sorted(counts)
    more = f" and {len(values) - 8} more" if len(values) > 8 else ""
    pixels = sum(counts.values())
    return (
        f"label{'s' * (len(values) > 1)} {', '.join(map(str, values[:8]))}{more} ({pixels:,} pixel{'s' * (pixels > 1)})"
    )


def labelled_pixels(labels: Array, num_labels: int, ignore_label: int | None) -> Array:
    """Which pixels (H, W) have a label that is not the ignore label.

    Raises:
        ValueError: a label outside 0..``num_labels`` - 1, with the values and the number of pixels (the caller knows
            the file's name).
    """
    is_ignored = np.zeros(labels.shape, bool) if ignore_label is None else labels == ignore_label
    unknown = ((labels < 0) | (labels >= num_labels)) & ~is_ignored
    if unknown.any():
        ignored = "" if ignore_label is None else f" or the ignore label {ignore_label}"
        raise ValueError(f"{describe_labels(labels[unknown])}, expected 0..{num_labels - 1}{ignored}")
    return ~is_ignored


def label_problems(files: Sequence[LabelFile], run: Runner = map) -> list[str]:
    """What is wrong with label files, a line a kind of fault with its number of files and some of them."""
    broken, sizes, unknown = [], [], []
    counts: dict[int, int] = {}
    for file, (error, size, found) in zip(files, run(_inspect, files), strict=True):
        name = os.path.basename(file.path)
        broken += [f"{name}: {error}"] * bool(error)
        sizes += [f"{name} ({size})"] * bool(size)
        if found:
            unknown.append(file)
            for label, pixels in found.items():
                counts[label] = counts.get(label, 0) + pixels
    problems = []
    if broken:
        problems.append(f"{len(broken)} of {len(files)} label files cannot be read: {_examples(broken)}")
    if sizes:
        problems.append(f"{len(sizes)} of {len(files)} label files are not of their image's size: {_examples(sizes)}")
    if unknown:
        names = _examples([os.path.basename(file.path) for file in unknown])
        where = f"in {len(unknown)} of {len(files)} label files: {names}"
        problems.append(f"{describe_counts(counts)} {where}; expected {_allowed(unknown[0])}")
    return problems


def _allowed(file: LabelFile) -> str:
    if file.panoptic:
        return "the ids of the annotation file's segments"
    last = f"0..{len(file.labels) - 1}"
    return last if file.ignore_label is None else f"{last} and {file.ignore_label} for unlabelled pixels"


def _examples(texts: Sequence[str]) -> str:
    return ", ".join(texts[:_NUM_EXAMPLES]) + (", ..." if len(texts) > _NUM_EXAMPLES else "")


def _inspect(file: LabelFile) -> tuple[str, str, dict[int, int]]:
    """Why the file cannot be read, its size if that is another than the image's, and the pixels of unknown labels."""
    try:
        labels = read_image(file.path)
        size = labels.shape[:2] if file.image is None else image_size(file.image)
    except (OSError, ValueError, UnidentifiedImageError) as error:
        return " ".join(str(error).split()), "", {}
    if labels.ndim != (3 if file.panoptic else 2):
        return f"shape {labels.shape}, expected {'(H, W, 3)' if file.panoptic else '(H, W)'}", "", {}
    if file.panoptic:
        labels = decode_rgb_ids(labels)
    difference = "" if labels.shape == size else f"{_by(labels.shape)}, image {_by(size)} (height x width)"
    values, counts = np.unique(labels, return_counts=True)
    known = np.isin(values, [*file.labels, *([] if file.ignore_label is None else [file.ignore_label])])
    return "", difference, dict(zip(values[~known].tolist(), counts[~known].tolist(), strict=True))


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"
