"""FGA-seg's cost volume: time and memory against the number of classes and the best k of each pixel."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from ovseg_d2.modeling.pixel_classification.cost_head import CostHead
from ovseg_d2.structures import TextClasses, Vocabulary
from tools.benchmarks.random_parts import random_model
from tools.benchmarks.timing import Timings, time_and_memory
from tools.memory import in_own_process


class PlantedScores(nn.Module):
    """An auxiliary head that makes its convolution, and prefers the first classes, each at some pixels, to all others.

    Args:
        conv: the learned head.
        planted: how many classes are preferred.
        total: how many there are in all its calls for an image, which may come in chunks; None: in one call.
    """

    def __init__(self, conv: nn.Conv2d, planted: int, total: int | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.planted = planted
        self.total = total
        self.start = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = self.start + torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)
        self.start = 0 if self.total is None else (self.start + len(x)) % self.total
        scores = torch.rand_like(x[:, :1]).where(ids < self.planted, -ids.float())
        return self.conv(x) * 0 + scores


@contextmanager
def planted_classes(head: CostHead, planted: int, total: int):
    """Let the auxiliary heads prefer ``planted`` of ``total`` classes."""
    learned = head.aux_head, head.decoder.aux_heads
    head.aux_head = PlantedScores(learned[0], planted, total)
    head.decoder.aux_heads = nn.ModuleList(PlantedScores(conv, planted) for conv in learned[1])
    yield
    head.aux_head, head.decoder.aux_heads = learned


def cost_volume_figures(
    repeats: int, device: torch.device, sizes: Sequence[int] = (20, 150, 847), whole: bool = True
) -> Timings:
    """Print and return what :func:`run` says; for a process of its own."""
    opts = ("MODEL.OVSEG.CLIP.PRETRAINED", "", "MODEL.OVSEG.TEST.SLIDING.SIZE", "0")
    model, cfg = random_model("fga_seg/coco_stuff_ViTB16_fast.yaml", device, *opts)
    model.eval()
    head, dim, timings = model.cost_head, model.clip.embed_dim, {}

    def measure(name: str, function: Callable[[], object], classes: int, planted: int, top_k: int) -> None:
        head.top_k = top_k
        kept: list[int] = []
        handle = head.decoder.head.register_forward_pre_hook(lambda _module, args: kept.append(len(args[0])))
        attending = min(classes, head.max_classes or classes)
        with planted_classes(head, planted, attending), torch.inference_mode():
            values, cpu, mebibytes = time_and_memory(function, repeats=repeats, device=device)
        handle.remove()
        timings[name] = values
        survivors = sum(kept) // len(values)
        k, shown = top_k or "all", planted if top_k else "-"
        print(
            f"{name.split(',')[0]:<12}{classes:>8}{shown:>9}{k:>6}{survivors:>11}"
            f"{statistics.median(values):>11.0f}{cpu:>9.0f}{mebibytes:>9.0f}",
            flush=True,
        )

    print(f"{'part':<12}{'classes':>8}{'planted':>9}{'k':>6}{'survivors':>11}{'median ms':>11}{'CPU ms':>9}{'MiB':>9}")
    for classes in sizes:
        dense, text = torch.randn(1, dim, 24, 24, device=device), torch.randn(1, classes, 1, dim, device=device)
        widths = cfg.MODEL.OVSEG.FGA_SEG.DECODER_GUIDANCE_DIMS
        features = [
            torch.randn(1, width, 24 * f, 24 * f, device=device) for width, f in zip(widths, (2, 4), strict=True)
        ]
        cases = [(planted, k) for planted in (10, 30) for k in (1, 4, 8, 16, 32) if max(planted, k) < classes]
        head.max_classes = 0
        with torch.inference_mode():
            head(dense, text[:, :4], features)  # warms up
        for planted, k in [*cases, (classes, 16), (classes, 0)]:
            name = f"cost volume, {classes} classes, {planted} planted, k {k or 'all'}"
            measure(name, lambda x=(dense, text, features): head(*x), classes, planted, k)
    if not whole:
        return timings
    vocabulary = Vocabulary(names=tuple(f"class {i}" for i in range(classes)), is_thing=(False,) * classes)
    embeds = F.normalize(text[0], dim=-1)
    nothing = torch.zeros(classes, dtype=torch.bool, device=device)
    ids = torch.arange(classes, device=device)
    model.text = lambda _vocabulary: TextClasses(embeds=embeds, class_ids=ids, is_thing=nothing, seen=nothing)
    batch = [{"image": torch.randint(0, 256, (3, 384, 384)).float(), "vocabulary": vocabulary}]
    for name, k, limit in (("whole model", 16, 0), ("of 256", 16, 256), ("of 256", 0, 256)):
        head.max_classes = limit
        measure(f"{name}, {classes} classes, k {k or 'all'}", lambda: model(batch), classes, 30, k)
    return timings


def run(*, repeats: int, device: torch.device) -> Timings:
    """FGA-seg's cost volume of one image, 24 x 24 positions, widths as for ViT-B/16 (table VI in kind).

    How many classes survive the choice of the best k of each pixel depends on the image, so that is planted: 10 or 30
    classes score higher than all others everywhere, each best at some pixels, and the others' order is the same
    everywhere; or each class is among the best 16 of some pixel ("planted" equal to "classes"), so that all survive,
    as with k "all", which rules none out. MAX_CLASSES is 0, every class attends. Last the whole model with texts given,
    one 384 x 384 image at once to its scores, also with MAX_CLASSES 256 ("of 256"). MiB are the peak beyond the weights
    and the inputs.
    """
    return in_own_process(partial(cost_volume_figures, repeats, device), given_back=2**25)
