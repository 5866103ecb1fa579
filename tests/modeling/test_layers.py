"""Attention with a broadcast mask, point sampling and its keyed draws."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from ovseg_d2.modeling.layers.attention import MLP, MultiheadAttention, ResidualAttention
from ovseg_d2.modeling.layers.point_sampling import PointSampler, sample_points, uncertain_points
from tests.helpers import randomise


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_torch(masked):
    torch.manual_seed(0)
    ours = randomise(MultiheadAttention(16, 4, batch_first=True))
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(2, 3, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    blocked = torch.rand(2, 3, 5) < 0.4 if masked else None
    mask = blocked.repeat_interleave(4, dim=0) if masked else None
    torch.testing.assert_close(ours(query, key, value, blocked=blocked), theirs(query, key, value, attn_mask=mask)[0])
    torch.testing.assert_close(ours(query, query, query), theirs(query, query, query)[0])


@pytest.mark.parametrize("pre_norm", [False, True])
def test_residual_attention_adds_positions_to_queries_and_keys_only(pre_norm):
    torch.manual_seed(0)
    block = randomise(ResidualAttention(dim=8, num_heads=2, pre_norm=pre_norm))
    x, pos = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    y = block.norm(x) if pre_norm else x
    expected = x + block.attn(y + pos, y + pos, y)
    torch.testing.assert_close(block(x, pos), expected if pre_norm else block.norm(expected))


def test_mlp_has_no_relu_at_its_end():
    mlp = randomise(MLP(in_dim=4, hidden_dim=8, out_dim=3, num_layers=3))
    x = torch.randn(5, 4)
    a, b, c = mlp.layers
    torch.testing.assert_close(mlp(x), c(b(a(x).relu()).relu()))


def test_sample_points_reads_pixel_centres():
    maps = torch.arange(12.0).view(1, 1, 3, 4)
    points = torch.tensor([[[0.5 / 4, 0.5 / 3], [3.5 / 4, 2.5 / 3], [1.0 / 4, 0.5 / 3]]])
    torch.testing.assert_close(sample_points(maps, points), torch.tensor([[[0.0, 11.0, 0.5]]]))


def test_draws_depend_on_image_and_iteration_not_on_the_batch():
    sampler, device = PointSampler(seed=3), torch.device("cpu")
    with EventStorage(7) as storage:
        together = sampler.start(["a", 5], device)([2, 1], 4)
        alone = sampler.start([5], device)([1], 4)
        torch.testing.assert_close(together[2:], alone)
        assert not torch.equal(together[1], together[2])
        storage.step()
        assert not torch.equal(sampler.start([5], device)([1], 4), alone)
    assert not torch.equal(PointSampler(seed=4).start([5], device)([1], 4), alone)


def test_draws_change_without_event_storage_too():
    sampler, device = PointSampler(), torch.device("cpu")
    first, second = (sampler.start([0], device)([1], 4) for _ in range(2))
    assert not torch.equal(first, second)


def test_uncertain_points_lie_at_the_boundary():
    logits = torch.linspace(-10, 10, 20).view(1, 1, 1, 20).expand(2, 1, 20, 20).contiguous()
    points = uncertain_points(
        logits,
        PointSampler().start([0, 1], logits.device),
        [1, 1],
        num_points=40,
        oversample_ratio=3.0,
        importance_ratio=0.75,
    )
    assert points.shape == (2, 40, 2)
    near = sample_points(logits, points)[:, 0].abs()
    assert near[:, :30].max() < near[:, 30:].max()
    assert (near[:, :30].diff(dim=1) >= 0).all()
