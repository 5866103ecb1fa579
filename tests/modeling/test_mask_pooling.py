"""Means inside masks, against loops."""

from __future__ import annotations

import pytest
import torch

from ovseg_d2.modeling.layers.mask_pooling import downsample_masks, pool_binary, pool_soft


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def test_pool_soft():
    features, masks = random(2, 4, 3, 5), random(2, 3, 3, 5, seed=1).sigmoid()
    masks[1, 2] = 0
    pooled = pool_soft(features, masks)
    for i in range(2):
        for j in range(3):
            expected = (features[i] * masks[i, j]).sum(dim=(1, 2)) / max(masks[i, j].sum(), 1e-6)
            torch.testing.assert_close(pooled[i, j], expected)
    assert (pooled[1, 2] == 0).all()


def test_pool_binary():
    features, logits = random(2, 4, 3, 5), random(2, 3, 3, 5, seed=1)
    logits[1, 2] = -1
    pooled = pool_binary(features, logits)
    for i in range(2):
        for j in range(3):
            inside = features[i][:, logits[i, j] > 0]
            torch.testing.assert_close(pooled[i, j], inside.mean(dim=1) if inside.numel() else torch.zeros(4))


@pytest.mark.parametrize("pool", [pool_soft, pool_binary])
def test_masks_of_another_size_are_resized(pool):
    features, masks = random(2, 4, 3, 5), random(2, 3, 17, 26, seed=1)
    torch.testing.assert_close(pool(features, masks), pool(features, downsample_masks(masks, (3, 5))))
    assert pool(features, masks[:, :0]).shape == (2, 0, 4)


def test_gradients():
    """Soft pooling trains masks, binary pooling does not."""
    features, masks = random(1, 4, 3, 5).requires_grad_(), random(1, 2, 6, 10, seed=1).requires_grad_()
    pool_binary(features, masks).sum().backward()
    assert masks.grad is None and features.grad.abs().sum() > 0
    pool_soft(features, masks.sigmoid()).square().sum().backward()
    assert masks.grad.abs().sum() > 0


def test_downsample_masks_samples_without_averaging():
    """Of a cell of 32 pixels only the middle ones count: a mask beside them vanishes."""
    masks = torch.zeros(1, 2, 64, 64)
    masks[0, 0, :8, :8] = 1
    masks[0, 1, 12:20, 12:20] = 1
    assert downsample_masks(masks, (2, 2)).flatten(1).tolist() == [[0, 0, 0, 0, 1, 0, 0, 0]]
    assert downsample_masks(masks, (64, 64)) is masks


def test_large_masks_in_half_precision():
    """More positions than half precision can count."""
    features = torch.ones(1, 2, 300, 300, dtype=torch.bfloat16)
    for pooled in (pool_soft(features, features[:, :1]), pool_binary(features, features[:, :1])):
        assert pooled.dtype == torch.bfloat16
        torch.testing.assert_close(pooled.float(), torch.ones(1, 1, 2), rtol=0.02, atol=0)
