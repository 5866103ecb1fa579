"""Draws one OVShapes picture with its exact segments; a pure function of a random generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ovseg_d2.data.datasets.ovshapes_textures import TEXTURES, smooth_noise

Array = np.ndarray

#: RGB of the eight colours, all well apart under the lighting below.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (212, 32, 38),
    "orange": (242, 128, 20),
    "yellow": (246, 216, 44),
    "green": (34, 160, 62),
    "blue": (34, 70, 212),
    "purple": (138, 50, 172),
    "white": (242, 242, 240),
    "black": (26, 26, 30),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "crescent")
STUFFS: tuple[str, ...] = tuple(TEXTURES)
NUM_THINGS = len(COLORS) * len(SHAPES)
NUM_CLASSES = NUM_THINGS + len(STUFFS)

_MIN_REGION = 0.14  # share of the image that each stuff region has at least, before things cover it
_MIN_VISIBLE = 0.6  # share of its whole shape that a thing shows at least
_PLACEMENT_TRIES = 12


@dataclass(frozen=True)
class Scene:
    """One picture. ``segment_ids`` holds 1..S; segment ``s`` is of class ``class_ids[s - 1]`` (stuff segments first).

    Attributes:
        image: (H, W, 3) uint8 RGB.
        segment_ids: (H, W) int32 in [1, S]; every pixel belongs to a segment.
        class_ids: S class indices in [0, 72): 64 things (colour-major), then 8 stuffs.
    """

    image: Array
    segment_ids: Array
    class_ids: tuple[int, ...]


def shape_mask(shape: str, x: Array, y: Array) -> Array:
    """Pixels inside a shape whose extent is about the unit circle; x to the right, y down."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius <= 0.92
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 0.8
    if shape == "triangle":
        return (y <= 0.72) & (np.abs(x) <= (y + 1) / math.sqrt(3))
    if shape == "star":
        sector = np.pi / 5
        angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)  # 0 at a tip, `sector` at a notch
        notch = 0.42
        # Line between the tip (1 at angle 0) and the notch, in polar form.
        edge = notch * np.sin(sector) / (notch * np.sin(sector - angle) + np.sin(angle))
        return radius <= 1.05 * edge
    if shape == "cross":
        return ((np.abs(x) <= 0.32) & (np.abs(y) <= 0.95)) | ((np.abs(y) <= 0.32) & (np.abs(x) <= 0.95))
    if shape == "heart":
        u, v = 1.22 * x, -1.22 * y + 0.12
        return (u * u + v * v - 1) ** 3 - u * u * v**3 <= 0
    if shape == "ring":
        return (radius <= 0.97) & (radius >= 0.52)
    if shape == "crescent":
        return (radius <= 0.97) & (np.hypot(x - 0.46, y) >= 0.78)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def _layout(rng: np.random.Generator, height: int, width: int, num_regions: int) -> Array:
    """Region index (H, W) in [0, num_regions): the image cut by wavy lines, each region of a fair size."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    size = min(height, width)
    while True:
        regions = np.zeros((height, width), np.int32)
        for index in range(1, num_regions):
            angle = rng.uniform(0, 2 * math.pi)
            along = math.cos(angle) * (x - width / 2) + math.sin(angle) * (y - height / 2)
            wave = smooth_noise(rng, height, width, 0.3 * size, 0.3 * size) - 0.5
            regions[along + 0.35 * size * wave > rng.uniform(-0.3, 0.3) * size] = index
        shares = np.bincount(regions.ravel(), minlength=num_regions) / regions.size
        if shares.min() >= _MIN_REGION:
            return regions


def _thing_mask(rng: np.random.Generator, height: int, width: int, shape: str, radius: float) -> tuple[Array, int]:
    """A mask (H, W) at a random place, and the area that the whole shape would have unclipped."""
    center_x, center_y = (rng.uniform(0.3 * radius, side - 0.3 * radius) for side in (width, height))
    angle = math.radians(rng.uniform(-25, 25))
    stretch = math.exp(rng.uniform(-0.16, 0.16))
    margin = int(np.ceil(1.3 * radius)) + 1
    left, top = int(center_x) - margin, int(center_y) - margin
    y, x = np.mgrid[top : top + 2 * margin + 1, left : left + 2 * margin + 1].astype(np.float32)
    x, y = (x - center_x) / radius, (y - center_y) / radius
    inside = shape_mask(
        shape,
        (math.cos(angle) * x + math.sin(angle) * y) / stretch,
        (math.cos(angle) * y - math.sin(angle) * x) * stretch,
    )
    mask = np.zeros((height, width), bool)
    top0, left0 = max(top, 0), max(left, 0)
    window = inside[top0 - top : height - top, left0 - left : width - left]
    mask[top0 : top0 + window.shape[0], left0 : left0 + window.shape[1]] = window
    return mask, int(inside.sum())


def _thing_colour(rng: np.random.Generator, height: int, width: int, colour: str) -> Array:
    """A shaded, slightly grainy fill (H, W, 3) float32 around one of the eight colours."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:height, :width].astype(np.float32) / max(height, width) - 0.5
    shade = 1 + rng.uniform(0, 0.45) * (math.cos(angle) * x + math.sin(angle) * y)
    base = np.float32(COLORS[colour]) + rng.uniform(-12, 12, 3).astype(np.float32)
    blotches = smooth_noise(rng, height, width, 6, 6) - 0.5
    return base * shade[..., None] + 22 * blotches[..., None]


def _light(rng: np.random.Generator, image: Array) -> Array:
    """Illumination gradient, exposure, white balance and sensor noise -> uint8."""
    height, width = image.shape[:2]
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:height, :width].astype(np.float32) / max(height, width) - 0.5
    field = rng.uniform(0.78, 1.12) * (1 + rng.uniform(0, 0.45) * (math.cos(angle) * x + math.sin(angle) * y))
    image = image * field[..., None] * rng.uniform(0.95, 1.05, 3).astype(np.float32)
    image = image + rng.uniform(2, 8) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def _place_things(
    rng: np.random.Generator, height: int, width: int, class_ids: Sequence[int], sizes: tuple[float, float]
) -> list[tuple[int, Array, int]]:
    """Back-to-front (class id, visible mask, whole area); a thing that would hide too much of another is moved."""
    placed: list[tuple[int, Array, int]] = []
    for class_id in class_ids:
        for _ in range(_PLACEMENT_TRIES):
            radius = 0.5 * min(height, width) * math.exp(rng.uniform(math.log(sizes[0]), math.log(sizes[1])))
            mask, area = _thing_mask(rng, height, width, SHAPES[class_id % len(SHAPES)], radius)
            left = [visible & ~mask for _, visible, _ in placed]
            fair = all(rest.sum() >= _MIN_VISIBLE * whole for rest, (_, _, whole) in zip(left, placed, strict=True))
            if fair and mask.sum() >= _MIN_VISIBLE * area:
                placed = [(other, rest, whole) for rest, (other, _, whole) in zip(left, placed, strict=True)]
                placed.append((class_id, mask, area))
                break
    return placed


def render_scene(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    thing_ids: Sequence[int] | None = None,
    stuff_ids: Sequence[int] | None = None,
    num_things: tuple[int, int] = (2, 7),
    num_stuffs: tuple[int, int] = (1, 3),
    thing_size: tuple[float, float] = (0.16, 0.52),
) -> Scene:
    """Draw a scene.

    Args:
        rng: everything random comes from it, so one seed gives one scene.
        height, width: size of the image in pixels, at least 16 each.
        thing_ids: classes in [0, 64) of the things, back to front; drawn at random when None.
        stuff_ids: distinct classes in [64, 72) of the regions; drawn at random when None.
        num_things: smallest and largest number of things when drawn at random.
        num_stuffs: the same for stuff regions.
        thing_size: smallest and largest diameter as a share of the shorter side; drawn log-uniformly.
    """
    if min(height, width) < 16:
        raise ValueError(f"OVShapes images have at least 16 pixels a side, got {height} x {width}")
    if stuff_ids is None:
        count = int(rng.integers(num_stuffs[0], num_stuffs[1] + 1))
        stuff_ids = [NUM_THINGS + int(i) for i in rng.permutation(len(STUFFS))[:count]]
    if thing_ids is None:
        thing_ids = [int(i) for i in rng.integers(0, NUM_THINGS, int(rng.integers(num_things[0], num_things[1] + 1)))]
        # Now and then a second instance of the same class: instances must be told apart, not only classes.
        if len(thing_ids) > 1 and rng.random() < 0.35:
            thing_ids[-1] = thing_ids[0]

    image = np.zeros((height, width, 3), np.float32)
    segment_ids = np.zeros((height, width), np.int32)
    regions = _layout(rng, height, width, len(stuff_ids))
    class_ids: list[int] = []
    for index, class_id in enumerate(stuff_ids):
        unit = min(height, width) / 15 * rng.uniform(0.8, 1.35)
        texture = TEXTURES[STUFFS[class_id - NUM_THINGS]](rng, height, width, unit)
        region = regions == index
        image[region] = texture[region]
        class_ids.append(class_id)
        segment_ids[region] = len(class_ids)
    for class_id, mask, _ in _place_things(rng, height, width, thing_ids, thing_size):
        fill = _thing_colour(rng, height, width, list(COLORS)[class_id // len(SHAPES)])
        image[mask] = fill[mask]
        class_ids.append(class_id)
        segment_ids[mask] = len(class_ids)

    # A region that things cover completely is no segment: renumber without it.
    present = np.bincount(segment_ids.ravel(), minlength=len(class_ids) + 1)[1:] > 0
    renumber = np.concatenate([[0], np.cumsum(present)]).astype(np.int32)
    kept = tuple(class_id for class_id, is_there in zip(class_ids, present, strict=True) if is_there)
    return Scene(image=_light(rng, image), segment_ids=renumber[segment_ids], class_ids=kept)
