"""Augmentations on their own."""

from __future__ import annotations

import numpy as np
import pytest
from detectron2.data import transforms as T

from ovseg_d2.data.augmentation import (
    FixedSizeCrop,
    PadToSize,
    SSDColorJitter,
    decode_rgb_ids,
    encode_rgb_ids,
    transform_labels,
)


def test_colour_code_is_cocos() -> None:
    ids = np.array([[0, 1, 255], [256, 65_536, 256 + 3 * 65_536 + 7]])
    rgb = encode_rgb_ids(ids)
    assert rgb[1, 2].tolist() == [7, 1, 3]
    np.testing.assert_array_equal(decode_rgb_ids(rgb), ids)


@pytest.mark.parametrize("size", [(10, 14), (40, 14), (10, 50), (40, 50)])
@pytest.mark.parametrize("factor", [1, 60_000])
def test_fixed_size_crop(size: tuple[int, int], factor: int) -> None:
    image = np.random.randint(0, 100, (24, 30, 3), np.uint8)
    labels = image[..., 0].astype(np.int32) * factor
    for _ in range(5):
        transforms = T.TransformList([FixedSizeCrop(size).get_transform(image)])
        out, out_labels = transforms.apply_image(image), transform_labels(labels, transforms, fill=251)
        assert out.shape == (*size, 3) and out_labels.shape == size
        padded = out_labels == 251
        assert padded.sum() == size[0] * size[1] - min(size[0], 24) * min(size[1], 30)
        assert (out[padded] == 128).all()
        np.testing.assert_array_equal(out_labels[~padded], out[~padded][:, 0].astype(int) * factor)


@pytest.mark.parametrize("factor", [1, 60_000])
@pytest.mark.parametrize("new_size", [(7, 9), (31, 13), (20, 20)])
def test_labels_are_resized_on_the_grid_of_the_image(factor: int, new_size: tuple[int, int]) -> None:
    """A pixel's label is that of the source pixel that its centre falls into."""
    labels = np.random.randint(0, 250, (20, 20)) * factor
    transforms = T.TransformList([T.ResizeTransform(20, 20, *new_size)])
    rows, columns = (((np.arange(n) + 0.5) * 20 / n).astype(int) for n in new_size)
    np.testing.assert_array_equal(transform_labels(labels, transforms, fill=0), labels[np.ix_(rows, columns)])


def test_fixed_size_crop_moves_both_axes_alike() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(40)[:, None], np.arange(40)
    corners = {tuple(FixedSizeCrop((10, 10)).get_transform(image).apply_image(image)[0, 0, :2]) for _ in range(40)}
    assert len(corners) > 5 and all(row == column for row, column in corners)


def test_pad_to_size() -> None:
    image = np.ones((3, 5, 3), np.uint8)
    transform = PadToSize((4, 6)).get_transform(image)
    assert transform.apply_image(image).shape == (4, 6, 3)
    assert transform.apply_segmentation(np.zeros((3, 5), np.uint8))[3, 5] == 255
    with pytest.raises(ValueError, match="PAD_SIZE is 4 but an image is 3 x 5"):
        PadToSize((4, 4)).get_transform(image)


def test_colour_jitter_keeps_labels_and_changes_the_image() -> None:
    image = np.random.randint(0, 256, (6, 7, 3), np.uint8)
    changed = 0
    for _ in range(20):
        transform = SSDColorJitter("RGB").get_transform(image)
        out = transform.apply_image(image)
        assert out.shape == image.shape and out.dtype == np.uint8
        changed += int((out != image).any())
        labels = image[..., 0]
        np.testing.assert_array_equal(transform.apply_segmentation(labels), labels)
    assert changed > 10


def test_colour_jitter_of_bgr_is_that_of_rgb() -> None:
    image = np.random.randint(0, 256, (6, 7, 3), np.uint8)
    for seed in range(10):
        np.random.seed(seed)
        rgb = SSDColorJitter("RGB").get_transform(image).apply_image(image)
        np.random.seed(seed)
        bgr = SSDColorJitter("BGR").get_transform(image).apply_image(image[..., ::-1].copy())
        np.testing.assert_array_equal(rgb, bgr[..., ::-1])


def test_colour_jitter_ranges() -> None:
    """On gray, hue and saturation do nothing: what is left is value * contrast + brightness, in either order."""
    gray = np.full((2, 2, 3), 100, np.uint8)
    values = np.array([int(SSDColorJitter("RGB").get_transform(gray).apply_image(gray)[0, 0, 0]) for _ in range(300)])
    assert values.min() < 60 and values.max() > 150  # contrast alone gives 50..150
    assert values.min() >= 33 and values.max() <= 199  # (100 - 32) * 0.5 .. (100 + 32) * 1.5
    assert (values == 100).mean() > 0.15  # a quarter has neither
