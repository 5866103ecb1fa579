"""t-SNE: the perplexity asked for, the true gradient, clusters that stay apart."""

import pytest
import torch

from ovseg_d2.inspection.tsne import joint_probs, tsne, tsne_gradient


def three_clusters(number=12):
    generator = torch.Generator().manual_seed(0)
    middles = 8 * torch.eye(3, 6)
    return (middles.repeat_interleave(number, 0) + torch.randn(3 * number, 6, generator=generator)).double()


def test_rows_have_the_perplexity():
    points = three_clusters()
    joint = joint_probs(points, 7.0)
    assert float(joint.sum()) == pytest.approx(1) and torch.equal(joint, joint.T)
    # A regular polygon: every row is alike, and symmetric rows keep their perplexity.
    angles = torch.arange(24).double() * torch.pi / 12
    rows = 24 * joint_probs(torch.stack([angles.cos(), angles.sin()], dim=1), 5.0)
    perplexity = (-(rows * (rows + 1e-12).log()).sum(1)).exp()
    torch.testing.assert_close(perplexity, torch.full_like(perplexity, 5.0), rtol=1e-4, atol=0)


def test_gradient_is_that_of_the_divergence():
    joint = joint_probs(three_clusters(4), 3.0)
    y = torch.randn(12, 2, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    weights = (1 / (1 + torch.cdist(y, y).square())) * (1 - torch.eye(12))
    q = weights / weights.sum()
    off = ~torch.eye(12, dtype=torch.bool)
    divergence = (joint[off] * (joint[off] / q[off]).log()).sum()
    (expected,) = torch.autograd.grad(divergence, y)
    torch.testing.assert_close(tsne_gradient(y.detach(), joint), expected, rtol=1e-6, atol=1e-9)


def test_clusters_stay_apart_and_the_picture_is_the_same_again():
    points = three_clusters()
    flat = tsne(points, perplexity=8.0, steps=200)
    assert (
        flat.shape == (36, 2) and flat.isfinite().all() and torch.equal(flat, tsne(points, perplexity=8.0, steps=200))
    )
    nearest = torch.cdist(flat, flat).fill_diagonal_(torch.inf).argmin(1)
    assert torch.equal(nearest // 12, torch.arange(36) // 12)
    assert tsne(points[:3], steps=50).isfinite().all() and tsne(points[:5, :1], steps=50).isfinite().all()
