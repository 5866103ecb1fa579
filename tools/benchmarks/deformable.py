"""Deformable attention: the core against its plain form."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ovseg_d2.modeling.layers.ms_deform_attn import deformable_sampling, deformable_sampling_by_grid
from ovseg_d2.modeling.proposals.pixel_decoder import pixel_centres
from tools.benchmarks.timing import Timings, in_turns


def run(*, repeats: int, device: torch.device) -> Timings:
    """The core at 512 x 512: levels of stride 32, 16 and 8, 8 heads of 32 channels, 4 points, offsets of 3 pixels."""
    torch.manual_seed(0)
    shapes = [(16, 16), (32, 32), (64, 64)]
    centres = pixel_centres(shapes, device)
    total, heads, dim, points = len(centres), 8, 32, 4
    sizes = torch.tensor([[w, h] for h, w in shapes], device=device)
    offsets = 3 * torch.randn(1, total, heads, len(shapes), points, 2, device=device) / sizes[:, None]
    locations = centres[None, :, None, None, None] + offsets
    weights = torch.rand(1, total, heads, len(shapes) * points, device=device).softmax(-1)
    weights = weights.view(1, total, heads, len(shapes), points)
    value = torch.randn(1, total, heads, dim, device=device)
    forms = {"core": deformable_sampling, "core, plain form": deformable_sampling_by_grid}

    def forward(form: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> None:
            with torch.inference_mode():
                form(value, shapes, locations, weights)

        return run

    def forward_backward(form: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> None:
            leaves = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
            form(leaves[0], shapes, *leaves[1:]).sum().backward()

        return run

    timings = in_turns({f"{k}, forward": forward(f) for k, f in forms.items()}, repeats=repeats, device=device)
    both = {f"{k}, forward + backward": forward_backward(f) for k, f in forms.items()}
    return timings | in_turns(both, repeats=repeats, device=device)
