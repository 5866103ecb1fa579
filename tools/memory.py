"""Memory of this process, or of what it holds on a GPU, in MiB; the CPU's figures are Linux's."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
_MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"


def resident(name: str) -> float:
    """Of this process: VmRSS now, VmHWM at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 2**10


def begin_peak(device: torch.device) -> float:
    """What is held now; :func:`peak` begins anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what lies in the heap unused is no part of it (glibc)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: torch.device) -> float:
    """The most that was held since :func:`begin_peak`, or since the process began."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else resident("VmHWM")


def in_own_process(call: Callable[[], T], *, given_back: int | None = None) -> T:
    """What a call gives in a fresh process, where nothing is held from before; with as many threads as this one.

    Args:
        call: can be pickled.
        given_back: bytes from which a tensor's memory is given back at once, so that a peak is one of tensors that are
            there together (glibc); None: as it comes.
    """
    former = os.environ.get(_MMAP_THRESHOLD)
    if given_back is not None:
        os.environ[_MMAP_THRESHOLD] = str(given_back)
    try:
        threads = torch.get_num_threads()
        with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
            return pool.submit(call).result()
    finally:
        os.environ.pop(_MMAP_THRESHOLD, None)
        if former is not None:
            os.environ[_MMAP_THRESHOLD] = former
