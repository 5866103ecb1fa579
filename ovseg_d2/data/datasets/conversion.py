"""What the scripts that convert label files share: a pool with a progress bar, and files that are whole or absent."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

Array = np.ndarray


def get_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options of every conversion: ``--workers`` and ``--force``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="processes (%(default)s)")
    parser.add_argument("--force", action="store_true", help="write files again that exist already")
    return parser


def run_jobs(job: Callable[[Any], Any], items: Sequence[Any], *, workers: int, description: str) -> None:
    """``job(item)`` for all items in processes, with a progress bar; an exception of a job is raised here."""
    with multiprocessing.Pool(workers) as pool:
        for _ in tqdm(pool.imap_unordered(job, items, chunksize=8), total=len(items), desc=description, unit="image"):
            pass


def require_folder(folder: str) -> str:
    """The folder; ``FileNotFoundError`` where there is none."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"folder {folder} does not exist (see --help)")
    return folder


def read_names(path: str) -> list[str]:
    """The first word of every line of a list of images."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist (see --help)")
    with open(path, encoding="utf-8") as file:
        return [line.split()[0] for line in file if line.strip()]


def save_image(path: str, pixels: Array) -> None:
    """Write an image, of the format that the suffix names; a kill in the middle leaves no half file behind."""
    stem, suffix = os.path.splitext(path)
    temporary = f"{stem}.{os.getpid()}.tmp"
    Image.fromarray(pixels).save(temporary, format=Image.registered_extensions()[suffix])
    os.replace(temporary, path)


def renumber(labels: Array, class_ids: Sequence[int], *, ignore: Sequence[int], ignore_label: int, path: str) -> Array:
    """Contiguous classes of a dataset's own numbers.

    Args:
        labels: (H, W) non-negative integers.
        class_ids: K numbers, one a class, in the order of the classes.
        ignore: numbers without a class.
        ignore_label: what those become; 255 gives uint8, 65535 uint16.
        path: the file, for the error.

    Returns:
        (H, W), 0..K-1 or ``ignore_label``.

    Raises:
        ValueError: any other number.
    """
    table = np.full(max(int(labels.max(initial=0)), *class_ids, *ignore) + 1, -1, np.int64)
    table[list(class_ids)] = np.arange(len(class_ids))
    table[list(ignore)] = ignore_label
    classes = table[labels]
    if (classes < 0).any():
        raise ValueError(
            f"{path}: label {int(labels[classes < 0].max())} is none of the {len(class_ids)} classes; expected the "
            "files as they were downloaded"
        )
    return classes.astype(np.uint8 if ignore_label == 255 else np.uint16)
