"""Position tables on other grids."""

import pytest
import torch
from torch.nn import functional as F

from ovseg_d2.modeling.layers.position_embedding import resize_position_embedding


def table(rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_rows_before_the_grid_stay(mode, align_corners, num_prefix):
    pos = table(num_prefix + 16)
    resized = resize_position_embedding(pos, (3, 7), mode=mode, align_corners=align_corners, num_prefix=num_prefix)
    assert resized.shape == (num_prefix + 21, 3)
    assert torch.equal(resized[:num_prefix], pos[:num_prefix])
    grid = pos[num_prefix:].T.reshape(1, 3, 4, 4)
    expected = F.interpolate(grid, size=(3, 7), mode=mode, align_corners=align_corners)[0].flatten(1).T
    torch.testing.assert_close(resized[num_prefix:], expected)
    with_batch = resize_position_embedding(
        pos[None], (3, 7), mode=mode, align_corners=align_corners, num_prefix=num_prefix
    )
    assert torch.equal(with_batch, resized[None])


def test_the_same_grid_gives_the_same_table():
    pos = table(17)
    assert resize_position_embedding(pos, (4, 4), mode="bicubic", align_corners=False) is pos


def test_half_precision_and_gradient():
    pos = table(17).half().requires_grad_()
    resized = resize_position_embedding(pos, (5, 2), mode="bicubic", align_corners=True)
    assert resized.dtype == torch.float16
    resized.sum().backward()
    assert pos.grad.any()


@pytest.mark.parametrize(
    ("rows", "mode", "words"),
    [(17, "nearest", "'nearest'.*bicubic"), (16, "bicubic", "15 make no square"), (1, "bicubic", "0")],
)
def test_bad_arguments(rows, mode, words):
    with pytest.raises(ValueError, match=words):
        resize_position_embedding(table(rows), (3, 3), mode=mode, align_corners=False)
