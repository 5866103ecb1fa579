"""The drawing of OVShapes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ovseg_d2.data.datasets import ovshapes
from ovseg_d2.data.datasets.ovshapes_scene import (
    COLORS,
    NUM_CLASSES,
    NUM_THINGS,
    SHAPES,
    STUFFS,
    render_scene,
    shape_mask,
)
from ovseg_d2.data.datasets.ovshapes_textures import TEXTURES


def test_vocabulary() -> None:
    assert (len(COLORS), len(SHAPES), len(STUFFS)) == (8, 8, 8)
    assert len(set(ovshapes.CLASS_NAMES)) == NUM_CLASSES == 72
    assert ovshapes.CLASS_NAMES[3] == "red star" and ovshapes.CLASS_NAMES[63] == "black crescent"
    assert ovshapes.CLASS_NAMES[64:] == STUFFS
    assert [ovshapes.is_thing(i) for i in (0, 63, 64, 71)] == [True, True, False, False]


def test_split() -> None:
    unseen = ovshapes.UNSEEN_CLASS_IDS
    assert sum(i < NUM_THINGS for i in unseen) == 16 and sum(i >= NUM_THINGS for i in unseen) == 2
    assert sorted(unseen + ovshapes.SEEN_CLASS_IDS) == list(range(72))
    things = [divmod(i, 8) for i in unseen if i < NUM_THINGS]
    # Two unseen combinations of every colour and of every shape, so each occurs in six seen classes.
    for index in (0, 1):
        assert sorted(pair[index] for pair in things) == sorted(list(range(8)) * 2)


def test_display_colours_are_distinct() -> None:
    colors = [ovshapes.display_color(i) for i in range(NUM_CLASSES)]
    assert len(set(colors)) == NUM_CLASSES
    assert all(0 <= value <= 255 for color in colors for value in color)


def test_shapes_differ_and_fill_the_unit_circle() -> None:
    y, x = np.mgrid[-1.2:1.2:61j, -1.2:1.2:61j]
    masks = [shape_mask(shape, x, y) for shape in SHAPES]
    for mask in masks:
        assert 0.25 < mask.sum() / (np.hypot(x, y) <= 1).sum() < 1.0
        assert not mask[np.hypot(x, y) > 1.3].any()
    for first, second in itertools.combinations(masks, 2):
        assert (first & second).sum() / (first | second).sum() < 0.85
    with pytest.raises(ValueError, match="unknown shape 'blob'; known: circle"):
        shape_mask("blob", x, y)


@pytest.mark.parametrize("name", STUFFS)
def test_textures_vary_with_the_seed(name: str) -> None:
    first, second, again = (TEXTURES[name](np.random.default_rng(seed), 40, 30, 8.0) for seed in (1, 2, 1))
    assert first.shape == (40, 30, 3)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).mean() > 3
    assert first.std() > 5


@pytest.mark.parametrize("seed", range(12))
def test_scene(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(n) for n in rng.integers(40, 90, 2))
    scene = render_scene(rng, height, width)
    assert scene.image.shape == (height, width, 3) and scene.image.dtype == np.uint8
    assert scene.segment_ids.shape == (height, width)
    present = np.unique(scene.segment_ids)
    np.testing.assert_array_equal(present, np.arange(1, len(scene.class_ids) + 1))  # no gap, no unlabelled pixel
    stuffs = [c for c in scene.class_ids if c >= NUM_THINGS]
    assert 1 <= len(set(stuffs)) == len(stuffs) <= 3
    assert 1 <= len(scene.class_ids) - len(stuffs) <= 7


def test_things_have_their_colour_and_hide_what_is_behind() -> None:
    """A blue circle in front of a red square on sand: mean colours, and no thing shows less than 60 % of itself."""
    red_square, blue_circle, sand = 1, 32, 64 + STUFFS.index("sand")
    for seed in range(8):
        scene = render_scene(
            np.random.default_rng(seed),
            64,
            64,
            thing_ids=[red_square, blue_circle],
            stuff_ids=[sand],
            thing_size=(0.5, 0.6),
        )
        if len(scene.class_ids) < 3:
            continue  # no fair place was found
        assert scene.class_ids == (sand, red_square, blue_circle)
        red, blue = (scene.image[scene.segment_ids == s].mean(axis=0) for s in (2, 3))
        assert red.argmax() == 0 and blue.argmax() == 2
        radius = 0.25 * 64
        assert (scene.segment_ids == 2).sum() >= 0.6 * (1.6 * radius) ** 2 * 0.9
        break
    else:
        pytest.fail("no scene with both things")


def test_same_seed_same_picture() -> None:
    first, second = (render_scene(np.random.default_rng([5, 1, 2]), 50, 60) for _ in range(2))
    other = render_scene(np.random.default_rng([5, 1, 3]), 50, 60)
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.segment_ids, second.segment_ids)
    assert first.class_ids == second.class_ids
    assert (first.image != other.image).any()


def test_occlusion_and_variety() -> None:
    """Over many pictures: every class occurs, and some things are partly hidden or cut by the border."""
    classes, counts = set(), []
    for seed in range(150):
        scene = render_scene(np.random.default_rng(seed), 48, 48)
        classes |= set(scene.class_ids)
        counts.append(sum(c < NUM_THINGS for c in scene.class_ids))
    assert len(classes) > 68
    assert min(counts) <= 2 and max(counts) >= 6


def test_too_small() -> None:
    with pytest.raises(ValueError, match="at least 16 pixels a side, got 8 x 40"):
        render_scene(np.random.default_rng(0), 8, 40)
