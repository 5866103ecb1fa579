"""Memory of this process, or of what it holds on a GPU, in MiB; the CPU's figures are Linux's."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


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
