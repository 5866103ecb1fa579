"""Logits from windows."""

import pytest
import torch
from torch import Tensor

from ovseg_d2.modeling.inference.sliding_window import SlidingWindow


def pixelwise(windows: Tensor) -> Tensor:
    return torch.cat([windows, windows.square()], dim=1)


@pytest.mark.parametrize("size", [(8, 8), (20, 13), (5, 30), (3, 4), (8, 21)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_function_of_single_pixels_is_the_same_from_windows(size, batch_size):
    images = torch.randn(2, 3, *size)
    window = SlidingWindow(size=8, stride=5, batch_size=batch_size)
    torch.testing.assert_close(window(pixelwise, images), pixelwise(images))


def test_the_mean_of_the_windows_over_a_pixel():
    seen: list[Tensor] = []

    def number(windows: Tensor) -> Tensor:
        seen.append(windows)
        first = sum(map(len, seen[:-1]))
        values = torch.arange(first, first + len(windows), dtype=torch.float32)
        return values[:, None, None, None].expand(-1, 1, 2, 2)

    images = torch.arange(10.0).expand(1, 3, 4, 10)
    logits = SlidingWindow(size=4, stride=3, batch_size=2)(number, images)
    assert [len(windows) for windows in seen] == [2, 1]
    assert torch.cat(seen)[:, 0, 0, 0].tolist() == [0, 3, 6]
    # Window 0 covers 0 to 3, window 1 covers 3 to 6, window 2 covers 6 to 9.
    assert logits[0, 0, 0].tolist() == [0, 0, 0, 0.5, 1, 1, 1.5, 2, 2, 2]


@pytest.mark.parametrize(
    ("length", "expected"), [(512, [0]), (300, [0]), (513, [0, 1]), (683, [0, 171]), (1024, [0, 341, 512])]
)
def test_the_grid_of_the_public_recipe(length, expected):
    window = SlidingWindow(size=512, stride=341)
    assert window.starts(length) == expected
    assert len(expected) == max(length - 512 + 340, 0) // 341 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 40, "stride": 8, "divisibility": 32}, "SIZE is 40; expected a multiple"),
        ({"size": 32, "stride": 0}, "STRIDE is 0; expected 1 to SIZE, 32"),
        ({"size": 32, "stride": 33}, "STRIDE is 33"),
        ({"size": 32, "stride": 8, "batch_size": 0}, "BATCH is 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindow(**options)


@pytest.mark.parametrize("size", [(8, 8), (20, 13), (5, 30)])
@pytest.mark.parametrize("image_size", [0, 16])
def test_scores_of_an_image_that_looks_the_same_everywhere(size, image_size):
    image = torch.tensor([0.5, -1.0, 2.0])[:, None, None].expand(-1, *size)
    window = SlidingWindow(size=8, stride=5, image_size=image_size, whole_image=True)
    scores = window.image_scores(pixelwise, image, torch.sigmoid)
    expected = pixelwise(image[None])[0].sigmoid()[:, :1, :1]
    torch.testing.assert_close(scores, expected.expand(-1, *((image_size, image_size) if image_size else size)))


def test_the_whole_image_counts_as_much_as_all_windows():
    def kind(windows: Tensor) -> Tensor:  # 0 for a window of the ramp, 1 for all of it
        return (windows[:, :1].amax((2, 3), keepdim=True) - windows[:, :1].amin((2, 3), keepdim=True) > 0.8).float()

    image = torch.linspace(0, 1, 32).expand(3, 32, 32)
    window = SlidingWindow(size=16, stride=16, whole_image=True)
    torch.testing.assert_close(window.image_scores(kind, image, lambda x: x), torch.full((1, 32, 32), 0.5))


def test_wrong_image_size():
    with pytest.raises(ValueError, match="SLIDING.IMAGE_SIZE is -1"):
        SlidingWindow(size=8, stride=8, image_size=-1)
