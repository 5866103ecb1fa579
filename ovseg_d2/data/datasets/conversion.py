"""What the scripts that convert label files share: a pool with a progress bar, files that are whole or absent, and a
look at what was written."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.io
from PIL import Image
from tqdm import tqdm

from ovseg_d2.data.label_files import LabelFile, describe_labels, label_problems

Array = np.ndarray


def get_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options of every conversion: ``--workers`` and ``--force``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="processes (%(default)s)")
    parser.add_argument("--force", action="store_true", help="write files again that exist already")
    return parser


def run_jobs(job: Callable[[Any], Any], items: Sequence[Any], *, workers: int, description: str) -> list[Any]:
    """``job(item)`` for all items in processes, with a progress bar; an exception of a job is raised here.

    Returns:
        the results, in the order of the items.
    """
    if not items:
        return []
    bar = {"total": len(items), "desc": description, "unit": "image"}
    if workers <= 1:
        return list(tqdm(map(job, items), **bar))
    with multiprocessing.Pool(workers) as pool:
        return list(tqdm(pool.imap(job, items, chunksize=8), **bar))


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


def read_mat(path: str, key: str) -> Array:
    """The label map (H, W) int64 at ``key`` of a MATLAB file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or has no such label map.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist (see --help)")
    try:
        content = scipy.io.loadmat(path)
    except (ValueError, NotImplementedError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if key not in content or content[key].ndim != 2:
        raise ValueError(f"{path} has no {key} (H, W)")
    return content[key].astype(np.int64)


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[str]:
    """The name of a temporary file that becomes ``path`` when all is written: a kill or a full disk in the middle
    leaves nothing that could be taken for a finished file.

    Raises:
        OSError: the file cannot be written; says how to go on.
    """
    temporary = f"{os.path.splitext(path)[0]}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            reason = f"{error.strerror}; finished files are whole, and the same command goes on from there"
            raise OSError(error.errno, reason, path) from None
        raise


def save_image(path: str, pixels: Array) -> None:
    """Write an image, of the format that the suffix names."""
    with whole_file(path) as temporary:
        Image.fromarray(pixels).save(temporary, format=Image.registered_extensions()[os.path.splitext(path)[1]])


def save_json(path: str, content: Any) -> None:
    """Write a JSON file."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file)


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
            f"{path}: {describe_labels(labels[classes < 0])} of none of the {len(class_ids)} classes; expected the "
            "files as they were downloaded"
        )
    return classes.astype(np.uint8 if ignore_label == 255 else np.uint16)


def verify_labels(
    folder: str,
    files: Sequence[str],
    *,
    num_classes: int,
    ignore_label: int,
    workers: int,
    image_root: str | None = None,
) -> None:
    """Read what was written: all label files there, of the size of their images, with nothing but labels of the table.

    Args:
        files: names of the label files.
        image_root: folder of the images, ``.jpg``; None or one without an image: sizes are not compared.

    Raises:
        ValueError: any of these is not so.
    """
    missing = sorted(set(files) - set(os.listdir(folder)))
    if missing:
        raise ValueError(f"{folder}: {len(missing)} of {len(files)} label files are missing: {', '.join(missing[:3])}")

    def image(file: str) -> str | None:
        path = os.path.join(image_root or "", os.path.splitext(file)[0] + ".jpg")
        return path if image_root and os.path.isfile(path) else None

    expected = [LabelFile(os.path.join(folder, file), image(file), range(num_classes), ignore_label) for file in files]
    problems = label_problems(
        expected, lambda job, items: run_jobs(job, items, workers=workers, description="checking")
    )
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}; --force writes them again")
