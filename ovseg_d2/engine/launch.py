"""Start a job in one process, on several GPUs, in several CPU processes, on several machines, or under torchrun."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as torch_multiprocessing
from detectron2.utils import comm

from ovseg_d2.engine.load_config import load_config
from ovseg_d2.engine.setup import available_device

# Evaluation of one process can keep the others waiting for long.
TIMEOUT = timedelta(hours=2)
# When a process fails, the others have these seconds to write their logs and to end by themselves.
GRACE = 5.0
# Errors of the input, which reach the caller of ``launch`` as they are.
USER_ERRORS = (ValueError, FileNotFoundError)


@dataclass(frozen=True)
class Place:
    """Where a process stands among all of them."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    url: str  # where the processes meet


def launch(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """Run ``main(args)`` in as many processes as the command line, or torchrun, asks for.

    GPU processes talk over nccl, CPU processes (``MODEL.DEVICE cpu``, or no GPU there) over gloo;
    ``detectron2.utils.comm`` works in all of them.

    Args:
        main: a function at the top level of a module, so that new processes can import it.
        args: of ``default_argument_parser``.

    Returns:
        What ``main`` returns, if it runs in this process.

    Raises:
        ValueError, FileNotFoundError: as raised by ``main``, also when it ran in another process.
        torch.multiprocessing.ProcessRaisedException, ProcessExitedException: another process died otherwise.
    """
    # Errors of the config appear here, once, before any process starts.
    wanted = load_config(args.config_file, args.opts).MODEL.DEVICE
    on_cpu = torch.device(available_device(wanted)).type == "cpu"
    under_torchrun = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()
    local_size = max(1, args.num_gpus)
    if local_size * args.num_machines == 1 and not under_torchrun:
        return main(args)
    if torch.device(wanted).type == "cuda" and torch.device(wanted).index is not None:
        raise ValueError(f"MODEL.DEVICE is {wanted!r}; expected 'cuda', of which each process takes a GPU of its own")
    if under_torchrun:
        return _run(main, args, _place_under_torchrun(), on_cpu)
    if torch.device(wanted).type != "cpu":  # one process falls back to the CPU, several would hide a broken driver
        _check_gpus(local_size)
    return _spawn(main, args, local_size, _rendezvous(args), on_cpu)


def _place_under_torchrun() -> Place:
    rank, world_size, local_rank = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Place(rank, world_size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), "env://")


def _rendezvous(args: argparse.Namespace) -> str:
    if not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(f"--machine-rank is {args.machine_rank}, expected 0 to {args.num_machines - 1}")
    if args.dist_url != "auto":
        return args.dist_url
    if args.num_machines > 1:
        raise ValueError("--dist-url is auto, but several machines need tcp://HOST:PORT of the machine with rank 0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


def _spawn(
    main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, local_size: int, url: str, on_cpu: bool
) -> None:
    errors = multiprocessing.get_context("spawn").SimpleQueue()
    context = torch_multiprocessing.start_processes(
        _child, (main, args, local_size, url, on_cpu, errors), nprocs=local_size, join=False, start_method="spawn"
    )
    try:
        _wait_for_all_or_failure(context.processes)
        # Stops the processes that are left after a failure.
        while not context.join():
            pass
    except (torch_multiprocessing.ProcessExitedException, torch_multiprocessing.ProcessRaisedException):
        # An error of the input says more than what the other processes make of the loss of the first.
        if errors.empty():
            raise
        raise errors.get() from None
    finally:
        for process in context.processes:
            process.kill()


def _wait_for_all_or_failure(processes: list[Any]) -> None:
    """Return when all processes have ended, or ``GRACE`` seconds after one of them has failed."""
    deadline = None
    while running := [process for process in processes if process.is_alive()]:
        if deadline is None and any(process.exitcode for process in processes):
            deadline = time.monotonic() + GRACE
        seconds_left = None if deadline is None else deadline - time.monotonic()
        if seconds_left is not None and seconds_left <= 0:
            return
        wait([process.sentinel for process in running], timeout=seconds_left)


def _child(
    local_rank: int,
    main: Callable[[argparse.Namespace], Any],
    args: argparse.Namespace,
    local_size: int,
    url: str,
    on_cpu: bool,
    errors: Any,
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place = Place(
        rank=args.machine_rank * local_size + local_rank,
        world_size=args.num_machines * local_size,
        local_rank=local_rank,
        local_size=local_size,
        url=url,
    )
    try:
        _run(main, args, place, on_cpu)
    except USER_ERRORS as error:
        if not raised_here(error):
            raise
        errors.put(type(error)(str(error)))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with_parent() -> None:
    """No process outlives the one that started it, even where that was killed and signals are ignored."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, place: Place, on_cpu: bool) -> Any:
    """``main(args)`` as one process of a group."""
    if on_cpu:
        _share_cores(place.local_size)
    else:
        _check_gpus(place.local_size)
        torch.cuda.set_device(place.local_rank)
    with _process_group(place, "gloo" if on_cpu else "nccl"):
        return main(args)


@contextmanager
def _process_group(place: Place, backend: str) -> Iterator[None]:
    try:
        dist.init_process_group(
            backend, init_method=place.url, rank=place.rank, world_size=place.world_size, timeout=TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"process {place.rank} cannot join the others at {place.url}: {reason}") from error
    # The processes of this machine, which detectron2 asks for. All processes take part in making every group.
    for first in range(0, place.world_size, place.local_size):
        group = dist.new_group(list(range(first, first + place.local_size)))
        if first <= place.rank < first + place.local_size:
            comm._LOCAL_PROCESS_GROUP = group
    try:
        comm.synchronize()
        yield
    finally:
        comm._LOCAL_PROCESS_GROUP = None
        dist.destroy_process_group()


def _check_gpus(local_size: int) -> None:
    if local_size > torch.cuda.device_count():
        raise ValueError(
            f"{local_size} processes need a GPU each (--num-gpus), found {torch.cuda.device_count()} GPUs; with "
            "MODEL.DEVICE cpu they run on the CPU"
        )


def _share_cores(local_size: int) -> None:
    """Each process takes its share of the cores: with all of them in each, processes slow each other down."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_size))


def raised_here(error: BaseException) -> bool:
    """Whether this package raised ``error``: then its one line says all; otherwise only the traceback helps."""
    package = Path(__file__).resolve().parents[1]
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return bool(traceback) and package in Path(traceback.tb_frame.f_code.co_filename).resolve().parents


@contextmanager
def one_line_errors() -> Iterator[None]:
    """For scripts: an error of the input ends the program with its one line instead of a traceback."""
    try:
        yield
    except USER_ERRORS as error:
        if not raised_here(error):
            raise
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
