"""Deformable attention: its two forms, gradients, borders, autocast, compilation."""

import pytest
import torch

from ovseg_d2.modeling.layers.ms_deform_attn import (
    MSDeformAttn,
    deformable_sampling_by_grid,
    deformable_sampling_by_rows,
)
from tests.helpers import randomise


def core_inputs(shapes, n=2, queries=7, heads=3, dim=5, points=4, spread=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(h * w for h, w in shapes)
    value = torch.randn(n, total, heads, dim, generator=generator)
    # Well beyond the map on all sides.
    locations = 0.5 + spread * torch.randn(n, queries, heads, len(shapes), points, 2, generator=generator)
    weights = torch.rand(n, queries, heads, len(shapes), points, generator=generator)
    return value, locations, weights


@pytest.mark.parametrize("shapes", [[(3, 5)], [(1, 1), (2, 7)], [(4, 3), (8, 6), (16, 11)]])
def test_both_forms_are_equal(shapes):
    results = []
    for form in (deformable_sampling_by_grid, deformable_sampling_by_rows):
        leaves = [tensor.double().requires_grad_() for tensor in core_inputs(shapes)]
        out = form(leaves[0], shapes, *leaves[1:])
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_rows_at_the_borders():
    """Pixel centres give the pixel, half a pixel outside gives half, a whole pixel outside nothing."""
    value = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    x = torch.tensor([0.5, 1.5, 2.5, 0.0, 3.0, -0.5, 3.5, -9.0, 1e6]) / 3
    locations = torch.stack([x, torch.full_like(x, 0.5)], dim=-1).view(1, 9, 1, 1, 1, 2)
    out = deformable_sampling_by_rows(value, [(1, 3)], locations, torch.ones(1, 9, 1, 1, 1))
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 2.0, 3.0, 0.5, 1.5, 0.0, 0.0, 0.0, 0.0]))


def test_nan_location_gives_nan_and_no_crash():
    value, locations, weights = core_inputs([(4, 4)])
    locations[0, 0] = float("nan")
    out = deformable_sampling_by_rows(value, [(4, 4)], locations, weights)
    assert out[0, 0].isnan().all() and out[:, 1:].isfinite().all()


@pytest.fixture
def module_and_inputs():
    torch.manual_seed(0)
    module = randomise(MSDeformAttn(dim=16, num_levels=2, num_heads=4, num_points=3))
    shapes = [(3, 4), (6, 7)]
    total = sum(h * w for h, w in shapes)
    return module, (torch.randn(2, 5, 16), torch.rand(2, 5, 2, 2), torch.randn(2, total, 16), shapes)


def test_autocast_keeps_locations_in_float32(module_and_inputs):
    module, inputs = module_and_inputs
    with torch.autocast("cpu", torch.bfloat16):
        values, locations, weights = module.sampling_inputs(*inputs)
        out = module(*inputs)
    assert {values.dtype, locations.dtype, weights.dtype} == {torch.float32}
    torch.testing.assert_close(out.float(), module(*inputs), rtol=0.1, atol=0.1)


def test_compiles_without_graph_breaks(module_and_inputs):
    module, inputs = module_and_inputs
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), module(*inputs))


def test_initial_offsets_are_a_star():
    module = MSDeformAttn(dim=16, num_levels=2, num_heads=4, num_points=2)
    offsets = module.sampling_offsets.bias.view(4, 2, 2, 2)
    torch.testing.assert_close(offsets[:, 0, 0], torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(offsets[:, 1, 1], 2 * offsets[:, 0, 0])


def test_bad_sizes():
    with pytest.raises(ValueError, match="dim 10 .* num_heads 4"):
        MSDeformAttn(dim=10, num_heads=4)
