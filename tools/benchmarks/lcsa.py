"""LDVC's local-consensus attention against attention of all pixels."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn import functional as F

from ovseg_d2.modeling.pixel_classification.routing_attention import LocalConsensusAttention
from tools.benchmarks.timing import Timings, in_turns, time_and_memory
from tools.memory import in_own_process

FORMS = ("gather", "dense", "all pixels", "all pixels, materialised")


def materialised(module: LocalConsensusAttention, x: torch.Tensor) -> torch.Tensor:
    """The module's attention of all pixels, with all its weights in memory: (N, h, w, C) -> (N, h, w, C)."""
    q, k, v = module.qkv(x).flatten(1, 2).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (module.scale * q @ k.mT).softmax(dim=-1)
    return module.out((weights @ v).transpose(1, 2).flatten(-2)).view_as(x)


def figures(repeats: int, device: torch.device, side: int, forms: Sequence[str]) -> Timings:
    """Print and return what :func:`run` says for maps of one side; for a process of its own."""
    torch.manual_seed(0)
    module = LocalConsensusAttention(dim=512).to(device)
    # Neighbours alike, as in features of images, so that windows differ.
    x = F.interpolate(torch.randn(1, 512, side // 8, side // 8, device=device), size=(side, side), mode="bilinear")
    x = F.layer_norm(x.permute(0, 2, 3, 1) + 0.5 * torch.randn(1, side, side, 512, device=device), (512,))

    def attend(form: str) -> torch.Tensor:
        if form == "all pixels, materialised":
            return materialised(module, x)
        module.top_k, module.form = (0, "auto") if form == "all pixels" else (16, form)
        return module(x)

    def forward(form: str) -> Callable[[], object]:
        def run() -> None:
            with torch.inference_mode():
                attend(form)

        return run

    def step(form: str) -> Callable[[], object]:
        return lambda: attend(form).square().mean().backward()

    timings: Timings = {}
    print(f"\n{side} x {side}{'':<28}{'median ms':>12}{'MiB':>9}{'step, ms':>12}{'MiB':>9}")
    with torch.inference_mode():
        module(x)  # warms up
    memory = {f: [time_and_memory(kind(f), repeats=1, device=device)[2] for kind in (forward, step)] for f in forms}
    for kind, name in ((forward, "forward"), (step, "step")):
        functions = {f"{form}, {side} x {side}, {name}": kind(form) for form in forms}
        timings |= in_turns(functions, repeats=repeats, device=device)
    for form, mebibytes in memory.items():
        medians = [statistics.median(timings[f"{form}, {side} x {side}, {name}"]) for name in ("forward", "step")]
        numbers = "".join(f"{t:>12.1f}{m:>9.0f}" for t, m in zip(medians, mebibytes, strict=True))
        print(f"{form:<35}{numbers}", flush=True)
    return timings


def run(
    *, repeats: int, device: torch.device, sides: Sequence[int] = (32, 64), forms: Sequence[str] = FORMS
) -> Timings:
    """LDVC's local-consensus attention on a map of 512 channels, 8 heads, the best 16 windows of 4 x 4: keys and values
    gathered, or attention of all pixels masked; beside it attention of all pixels, fused and with all its weights in
    memory. Forward, and a step of forward and backward; MiB are the peak beyond the weights and the input.
    """
    timings: Timings = {}
    for side in sides:
        timings |= in_own_process(partial(figures, repeats, device, side, forms), given_back=2**20)
    return timings
