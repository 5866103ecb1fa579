"""How parts are timed: figures in turns, by module, with memory; milliseconds everywhere."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm

from tools.memory import begin_peak, peak

#: Part -> milliseconds of its runs.
Timings = dict[str, list[float]]
#: Seconds after which a timing with its memory is not repeated.
SLOW = 2


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def in_turns(functions: dict[str, Callable[[], object]], *, repeats: int, device: torch.device) -> Timings:
    """Milliseconds of every function, called in turns; the first round warms up and is not counted."""
    timings: Timings = defaultdict(list)
    for repeat in tqdm(range(repeats + 1), desc="/".join(functions), leave=False):
        for name, function in functions.items():
            start = clock(device)
            function()
            if repeat:
                timings[name].append(1e3 * (clock(device) - start))
    return timings


@contextmanager
def timed_modules(modules: dict[str, nn.Module], into: Timings, device: torch.device):
    """Record the milliseconds that each module's forward takes."""
    starts: dict[str, float] = {}
    handles = []
    for name, module in modules.items():

        def before(_module: nn.Module, _args: object, name: str = name) -> None:
            starts[name] = clock(device)

        def after(_module: nn.Module, _args: object, _output: object, name: str = name) -> None:
            into[name].append(1e3 * (clock(device) - starts[name]))

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    yield
    for handle in handles:
        handle.remove()


def time_and_memory(
    function: Callable[[], object], *, repeats: int, device: torch.device
) -> tuple[list[float], float, float]:
    """Milliseconds of ``repeats`` calls, fewer if they are slow; those of the CPU for one, whatever else it was doing;
    the MiB at their peak beyond what was there."""
    before = begin_peak(device)
    timings, cpu_start = [], time.process_time()
    while len(timings) < repeats and sum(timings) < 1e3 * SLOW:
        start = clock(device)
        function()
        timings.append(1e3 * (clock(device) - start))
    cpu = 1e3 * (time.process_time() - cpu_start) / len(timings)
    return timings, cpu, peak(device) - before
