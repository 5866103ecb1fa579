"""CLIP's own copy of an image and of its masks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from ovseg_d2.modeling.clip.preprocess import (
    normalise_image,
    resize_and_pad,
    resize_image_batch,
    resize_masks,
    resized_size,
)


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [
        ((60, 101), "none", (60, 101)),
        ((60, 101), "square", (96, 96)),
        ((60, 101), "short", (96, 161)),  # 161.6
        ((101, 60), "short", (161, 96)),
        ((60, 60), "short", (96, 96)),
        ((200, 400), "short", (96, 192)),
    ],
)
def test_resized_size(size, resize, expected):
    assert resized_size(size, resize, 96) == expected


@pytest.mark.parametrize(
    ("resize", "input_size", "message"),
    [("long", 96, "RESIZE: 'long'; expected one of none, short, square"), ("short", 0, "INPUT_SIZE: 0; expected")],
)
def test_bad_options(resize, input_size, message):
    with pytest.raises(ValueError, match=f"^MODEL.OVSEG.CLIP.{message}"):
        resized_size((60, 60), resize, input_size)


def test_normalise_image():
    image = torch.tensor(CLIP_PIXEL_MEAN).view(3, 1, 1).expand(3, 4, 5) + torch.tensor(CLIP_PIXEL_STD).view(3, 1, 1)
    torch.testing.assert_close(normalise_image(image), torch.ones(3, 4, 5))
    assert normalise_image(torch.zeros(3, 4, 5, dtype=torch.uint8)).dtype == torch.float32


def test_images_and_masks_share_a_frame():
    sizes = [(40, 70), (61, 30)]
    masks = [torch.rand(2, *size) for size in sizes]
    batch = resize_and_pad(
        [mask[:1].expand(3, -1, -1) for mask in masks], resize="short", input_size=45, image_ids=["a", "b"]
    )
    assert batch.image_sizes == [(45, 78), (91, 45)] and batch.image_ids == ["a", "b"]
    assert batch.padded_size == (96, 96)
    for i, (mask, (h, w)) in enumerate(zip(masks, batch.image_sizes, strict=True)):
        resized = resize_masks(mask, (h, w), batch.padded_size)
        assert resized.shape == (2, 96, 96)
        torch.testing.assert_close(resized[0], batch.tensor[i, 0])
        assert resized[:, h:].abs().sum() == 0 == resized[:, :, w:].abs().sum()
    assert resize_masks(torch.zeros(0, 40, 70), (45, 78), (96, 96)).shape == (0, 96, 96)


def test_a_batch_is_resized_without_its_padding():
    images = [torch.randn(3, 40, 70), torch.randn(3, 61, 30)]
    batch = resize_and_pad(images, size_divisibility=32)
    assert batch.padded_size == (64, 96) and batch.image_ids == [0, 1]
    resized = resize_image_batch(batch, resize="square", input_size=32, size_divisibility=0)
    assert resized.padded_size == (32, 32) and resized.image_sizes == [(32, 32), (32, 32)]
    for i, image in enumerate(images):
        expected = F.interpolate(image[None], size=(32, 32), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(resized.tensor[i], expected)
    assert torch.equal(resize_image_batch(batch).tensor, batch.tensor)
