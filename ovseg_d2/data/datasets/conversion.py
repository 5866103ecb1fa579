"""What the scripts that convert label files share: a pool with a progress bar, files that are whole or absent, and a
look at what was written."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NoReturn

import numpy as np
import scipy.io
from PIL import Image
from tqdm import tqdm

from ovseg_d2.data.label_files import LabelFile, describe_labels, label_problems

Array = np.ndarray
#: Items that a process takes at once.
_CHUNK = 8
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def get_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options of every conversion: ``--workers`` and ``--force``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="processes (%(default)s)")
    parser.add_argument("--force", action="store_true", help="write files again that exist already")
    return parser


def run_script(main: Callable[[], int]) -> NoReturn:
    """Exit as ``main()`` says; what goes wrong is told in one line."""
    stopped = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and so cleans up
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted: no half-written file is kept; run the same command again\n")
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, stopped)


def run_jobs(job: Callable[[Any], Any], items: Sequence[Any], *, workers: int, description: str) -> list[Any]:
    """``job(item)`` for all items in processes, with a progress bar; an exception of a job is raised here.

    Returns:
        the results, in the order of the items.
    """
    if not items:
        return []
    bar = {"total": len(items), "desc": description, "unit": "image"}
    return list(tqdm(map_jobs(job, items, workers=workers), **bar))


def map_jobs(job: Callable[[Any], Any], items: Sequence[Any], *, workers: int) -> Iterator[Any]:
    """``job(item)`` in the order of the items, in processes if there is more than one worker.

    On an exception or an interrupt, the jobs that run are finished, and no others are begun.

    Raises:
        ChildProcessError: a process was killed.
    """
    if workers <= 1:
        yield from map(job, items)
        return
    chunk = max(1, min(_CHUNK, len(items) // workers))
    with ProcessPoolExecutor(workers, initializer=_stay_with_parent) as pool:
        try:
            # A process inherits the mask, so that no signal can end it before it knows what to do with one.
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            try:
                results = pool.map(job, items, chunksize=chunk)
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            yield from results
        except BrokenProcessPool:
            raise ChildProcessError(
                "a process was killed, maybe because the memory was full; finished files are whole, and the same "
                "command goes on from there, with fewer --workers if need be"
            ) from None


def _stay_with_parent() -> None:
    """In a process of the pool: signals are the parent's to handle, and the process ends when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


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
        if isinstance(error, OSError) and error.errno is not None:
            reason = f"{error.strerror}; finished files are whole, and the same command goes on from there"
            raise OSError(error.errno, reason, path) from None
        raise
    finally:
        # Also after a replacement: that of a link by another one to the same file leaves both.
        with contextlib.suppress(OSError):
            os.remove(temporary)


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
        ValueError: any of these is not so, or there are no files at all.
    """

    def image(label: str) -> str | None:
        stem = os.path.splitext(os.path.basename(label))[0]
        path = os.path.join(image_root or "", stem + ".jpg")
        return path if image_root and os.path.isfile(path) else None

    paths = [os.path.join(folder, file) for file in files]
    expected = [LabelFile(path, image(path), range(num_classes), ignore_label) for path in paths]
    verify_files(folder, expected, workers=workers)


def verify_files(folder: str, expected: Sequence[LabelFile], *, workers: int) -> None:
    """As :func:`verify_labels`, of files that say themselves what they should hold.

    Raises:
        ValueError: a file is missing or wrong, or there are none at all.
    """
    if not expected:
        raise ValueError(f"{folder}: there is nothing to convert, as the source has no label files (see --help)")
    missing = sorted({os.path.basename(file.path) for file in expected} - set(os.listdir(folder)))
    problems = [f"{len(missing)} of {len(expected)} label files are missing: {', '.join(missing[:3])}"] * bool(missing)
    if not missing:
        problems = label_problems(
            expected, lambda job, items: run_jobs(job, items, workers=workers, description="checking")
        )
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}; --force writes them again")
