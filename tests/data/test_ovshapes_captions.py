"""Image-caption pairs: what the pictures show is what the captions say."""

import numpy as np
import pytest

from ovseg_d2.data.datasets.ovshapes_captions import (
    CAPTION_TEMPLATES,
    caption_text,
    captioned_image,
    large_thing_image,
    zero_shot_image,
)
from ovseg_d2.data.datasets.ovshapes_scene import NUM_CLASSES, NUM_THINGS


@pytest.mark.parametrize("draw", [captioned_image, large_thing_image, zero_shot_image])
def test_pictures_are_functions_of_their_index(draw):
    first, again, other = draw(3, 32), draw(3, 32), draw(4, 32)
    assert first.image.shape == (32, 32, 3) and first.image.dtype == np.uint8
    assert np.array_equal(first.image, again.image) and first.class_ids == again.class_ids
    assert not np.array_equal(first.image, other.image)


def test_streams_differ():
    pictures = [draw(7, 48).image for draw in (captioned_image, large_thing_image, zero_shot_image)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])


def test_kinds_of_training_pictures():
    labels = [captioned_image(i, 24).class_ids for i in range(150)]
    assert all(0 < len(ids) <= 3 and len(set(ids)) == len(ids) for ids in labels)
    assert all(0 <= i < NUM_CLASSES for ids in labels for i in ids)
    only_stuff = [ids for ids in labels if min(ids) >= NUM_THINGS]
    single_things = [ids for ids in labels if len(ids) == 1 and ids[0] < NUM_THINGS]
    with_ground = [ids for ids in labels if len(ids) == 2 and ids[0] < NUM_THINGS <= ids[1]]
    assert len(single_things) > 75 and only_stuff and with_ground


def test_zero_shot_pictures_cover_all_things():
    assert [zero_shot_image(i, 16).class_ids for i in range(NUM_THINGS)] == [(i,) for i in range(NUM_THINGS)]


def test_captions():
    assert caption_text((3,), "a photo of a {}.") == "a photo of a red star."
    assert caption_text((3, 11, 64), "{}") == "red star, orange star and grass"
    assert len(CAPTION_TEMPLATES) > 100 and all(template.count("{}") == 1 for template in CAPTION_TEMPLATES)
