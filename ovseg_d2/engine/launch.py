"""Start a job in one process, on several GPUs, in several CPU processes, on several machines, or under torchrun."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
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
# Errors of the input, which reach the caller of ``launch`` as they are.
USER_ERRORS = (ValueError, FileNotFoundError)


@dataclass(frozen=True)
class Place:
    """Where a process stands among all of them."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    url: str


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
        RuntimeError: a process died otherwise; its traceback is on stderr.
    """
    # Errors of the config appear here, once, before any process starts.
    on_cpu = torch.device(available_device(load_config(args.config_file, args.opts).MODEL.DEVICE)).type == "cpu"
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return _run(main, args, _place_under_torchrun(), on_cpu)
    local_size = max(1, args.num_gpus)
    if local_size * args.num_machines == 1:
        return main(args)
    if not on_cpu and local_size > torch.cuda.device_count():
        raise ValueError(f"--num-gpus is {local_size}, this machine has {torch.cuda.device_count()}")
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
        # When one process ends badly, the others get a moment to end by themselves, then are stopped.
        while not context.join(grace_period=5):
            pass
    except torch_multiprocessing.ProcessExitedException as error:
        if errors.empty():
            raise RuntimeError(str(error)) from error
        raise errors.get() from None
    except BaseException:
        for process in context.processes:
            process.kill()
        raise


def _child(
    local_rank: int,
    main: Callable[[argparse.Namespace], Any],
    args: argparse.Namespace,
    local_size: int,
    url: str,
    on_cpu: bool,
    errors: Any,
) -> None:
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


def _run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, place: Place, on_cpu: bool) -> Any:
    """``main(args)`` as one process of a group."""
    if on_cpu:
        _share_cores(place.local_size)
    else:
        torch.cuda.set_device(place.local_rank)
    with _process_group(place, "gloo" if on_cpu else "nccl"):
        return main(args)


@contextmanager
def _process_group(place: Place, backend: str) -> Iterator[None]:
    try:
        dist.init_process_group(
            backend, init_method=place.url, rank=place.rank, world_size=place.world_size, timeout=TIMEOUT
        )
    except (RuntimeError, dist.DistNetworkError) as error:
        raise ValueError(f"process {place.rank} cannot join the others at {place.url}: {error}") from error
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
        # An error that a child process has sent has no traceback in the package, but was looked at there.
        if not raised_here(error):
            raise
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
