"""The eight stuff textures of OVShapes: pure functions of a random generator, a size and a pattern unit.

Every texture is drawn with its own random scale, direction, palette shift and noise, so that no two images share one,
and stays far less saturated than the things, as backgrounds of photographs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np

Array = np.ndarray
Texture = Callable[[np.random.Generator, int, int, float], Array]


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell_height: float, cell_width: float) -> Array:
    """Value noise (H, W) in [0, 1], one random value a cell of ``cell_height`` x ``cell_width`` pixels."""
    rows = max(2, int(np.ceil(height / cell_height)) + 1)
    cols = max(2, int(np.ceil(width / cell_width)) + 1)
    grid = rng.random((rows, cols), dtype=np.float32)
    return np.clip(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), 0.0, 1.0)


def _axes(rng: np.random.Generator, height: int, width: int, max_angle: float) -> tuple[Array, Array]:
    """Coordinates (x, y), each (H, W), of a randomly shifted frame turned by at most ``max_angle`` degrees."""
    angle = math.radians(rng.uniform(-max_angle, max_angle))
    shift_x, shift_y = (rng.uniform(0, max(height, width)) for _ in range(2))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return (
        math.cos(angle) * x + math.sin(angle) * y + shift_x,
        math.cos(angle) * y - math.sin(angle) * x + shift_y,
    )


def _mix(low: tuple[int, int, int], high: tuple[int, int, int], weight: Array) -> Array:
    """Blend of two RGB colours by ``weight`` (H, W) in [0, 1] -> (H, W, 3) float32."""
    low_rgb, high_rgb = np.float32(low), np.float32(high)
    return low_rgb + (high_rgb - low_rgb) * weight[..., None]


def _per_cell(rng: np.random.Generator, row: Array, col: Array) -> Array:
    """A random value in [0, 1] for each lattice cell (row, col), looked up for every pixel."""
    row = row.astype(np.int64) - int(row.min())
    col = col.astype(np.int64) - int(col.min())
    return rng.random((int(row.max()) + 1, int(col.max()) + 1), dtype=np.float32)[row, col]


def grass(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    """Leaning blades, dark between and yellowish at the tips, over drier and greener patches."""
    blades = smooth_noise(rng, height, 2 * width, 0.9 * unit, max(1.2, 0.16 * unit))
    y, x = np.mgrid[:height, :width]
    blades = blades[y, (x + rng.uniform(-0.5, 0.5) * (y - height) + width // 2).astype(np.int64) % (2 * width)]
    patches = smooth_noise(rng, height, width, 4 * unit, 4 * unit)
    return _mix((38, 66, 24), (124, 158, 62), 0.8 * blades + 0.2 * patches) + 16 * (patches[..., None] - 0.5)


def brick(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    """Running bond: red-brown bricks, each of its own shade, in pale mortar."""
    x, y = _axes(rng, height, width, 6)
    brick_height, brick_width = unit, 2.3 * unit
    row = np.floor(y / brick_height)
    x = x + 0.5 * brick_width * (row % 2)
    col = np.floor(x / brick_width)
    joint = max(1.2, 0.14 * unit)
    mortar = (y - row * brick_height < joint) | (x - col * brick_width < joint)
    shade = 0.8 * _per_cell(rng, row, col) + 0.2 * smooth_noise(rng, height, width, 0.3 * unit, 0.3 * unit)
    return np.where(mortar[..., None], np.float32((188, 178, 166)), _mix((112, 54, 42), (172, 94, 70), shade))


def wood(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    """Planks with grain along them, upright or lying."""
    upright = rng.random() < 0.5
    if upright:
        height, width = width, height
    x, y = _axes(rng, height, width, 3)
    row = np.floor(y / (2.4 * unit))
    plank = _per_cell(rng, row, np.zeros_like(row))
    warp = smooth_noise(rng, height, width, 1.0 * unit, 7 * unit)
    grain = 0.5 + 0.5 * np.sin(2 * math.pi * (y / (0.55 * unit) + 2.5 * warp + 9 * plank))
    colour = _mix((106, 70, 40), (178, 132, 84), 0.45 * plank + 0.35 * grain + 0.2 * warp)
    colour[y - row * 2.4 * unit < max(1.0, 0.12 * unit)] = (58, 38, 24)
    return colour.transpose(1, 0, 2) if upright else colour


def water(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    """Teal ripples with thin bright crests."""
    x, y = _axes(rng, height, width, 10)
    warp = smooth_noise(rng, height, width, 1.5 * unit, 3 * unit) + 0.3 * np.sin(x / (1.3 * unit))
    wave = 0.5 + 0.5 * np.sin(2 * math.pi * (y / (1.3 * unit) + 0.9 * warp))
    depth = smooth_noise(rng, height, width, 6 * unit, 6 * unit)
    colour = _mix((18, 74, 96), (58, 138, 152), 0.6 * wave + 0.4 * depth)
    crest = np.clip((wave - 0.86) / 0.14, 0, 1) * smooth_noise(rng, height, width, 0.8 * unit, 1.6 * unit)
    return colour + 105 * crest[..., None]


def sand(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    """Beige grains over faint wind ripples."""
    _, y = _axes(rng, height, width, 60)
    warp = smooth_noise(rng, height, width, 3 * unit, 3 * unit)
    ripple = 0.5 + 0.5 * np.sin(2 * math.pi * (y / (1.6 * unit) + 1.2 * warp))
    grains = rng.standard_normal((height, width), dtype=np.float32)
    return _mix((186, 160, 116), (222, 200, 154), 0.6 * ripple + 0.4 * warp) + 11 * grains[..., None]


def sky(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    """Blue that pales towards the horizon, with soft clouds."""
    fall = np.linspace(0, 1, height, dtype=np.float32)[:, None] * np.ones((1, width), np.float32)
    colour = _mix((98, 152, 214), (178, 206, 232), fall)
    noise = sum(smooth_noise(rng, height, width, 2.4 * unit / 2**i, 4.5 * unit / 2**i) / 2**i for i in range(4)) / 1.875
    cloud = np.clip((noise - rng.uniform(0.46, 0.56)) / 0.16, 0, 1)
    return colour + (np.float32((236, 238, 242)) - colour) * cloud[..., None]


def stone(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    """Grey cobbles: Voronoi cells of a jittered lattice with dark gaps."""
    x, y = _axes(rng, height, width, 45)
    x, y = x / (1.5 * unit), y / (1.5 * unit)
    col, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    col0, row0 = int(col.min()) - 1, int(row.min()) - 1
    shape = (int(row.max()) - row0 + 2, int(col.max()) - col0 + 2)
    rows, cols = np.mgrid[row0 : row0 + shape[0], col0 : col0 + shape[1]].astype(np.float32)
    centre_x = (cols + rng.uniform(0.12, 0.88, shape).astype(np.float32)).ravel()
    centre_y = (rows + rng.uniform(0.12, 0.88, shape).astype(np.float32)).ravel()
    # The nearest two of the nine surrounding centres (squared distances): they are nearly as far along the gaps.
    home = (row - row0) * shape[1] + col - col0
    first, second = np.full(x.shape, 99.0, np.float32), np.full(x.shape, 99.0, np.float32)
    nearest = home
    for d_row in (-1, 0, 1):
        for d_col in (-1, 0, 1):
            cell = home + (d_row * shape[1] + d_col)
            distance = np.square(x - centre_x.take(cell)) + np.square(y - centre_y.take(cell))
            second = np.minimum(second, np.maximum(first, distance))
            nearest = np.where(distance < first, cell, nearest)
            first = np.minimum(first, distance)
    shade = rng.random(centre_x.shape, dtype=np.float32).take(nearest)
    dome = np.clip((np.sqrt(second) - np.sqrt(first)) / 0.45, 0, 1)
    return _mix((44, 44, 46), (126, 128, 132), dome**0.6) * (0.78 + 0.5 * shade[..., None])


def tile(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    """A square lattice of pale glazed tiles in two shades, with dark grout."""
    x, y = _axes(rng, height, width, 20)
    side = 1.7 * unit
    row, col = np.floor(y / side), np.floor(x / side)
    joint = max(1.1, 0.13 * unit)
    grout = (y - row * side < joint) | (x - col * side < joint)
    gloss = (x - col * side + y - row * side) / (2 * side)
    shade = 0.25 * _per_cell(rng, row, col) + 0.45 * ((row + col) % 2) + 0.3 * gloss
    return np.where(grout[..., None], np.float32((92, 90, 96)), _mix((206, 186, 190), (168, 186, 192), shade))


TEXTURES: dict[str, Texture] = {
    texture.__name__: texture for texture in (grass, brick, wood, water, sand, sky, stone, tile)
}
