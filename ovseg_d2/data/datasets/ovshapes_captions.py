"""Image-caption pairs of OVShapes: what the tiny CLIPs are pre-trained on. No masks, only sentences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ovseg_d2.data.datasets.ovshapes import CLASS_NAMES
from ovseg_d2.data.datasets.ovshapes_scene import NUM_CLASSES, NUM_THINGS, render_scene
from ovseg_d2.data.templates import TEMPLATE_SETS

#: Every template of every set, once.
CAPTION_TEMPLATES: tuple[str, ...] = tuple(
    dict.fromkeys(template for templates in TEMPLATE_SETS.values() for template in templates)
)

#: First entry of the random streams: those of `ovshapes_writer` start with a small seed, those of the zero-shot test
#: with another number, so that no picture of either is trained on.
TRAINING_STREAM = 7_340_033
LARGE_THINGS_STREAM = 8_388_617
ZERO_SHOT_STREAM = 9_437_189


@dataclass(frozen=True)
class CaptionedImage:
    """A small picture and what it shows.

    Attributes:
        image: (S, S, 3) uint8 RGB.
        class_ids: the classes that its caption names, in [0, 72); one, or two or three for a sentence like "a red star,
            a blue ring and grass".
    """

    image: np.ndarray
    class_ids: tuple[int, ...]


def caption_text(class_ids: tuple[int, ...], template: str) -> str:
    """A sentence that names the classes; several are joined before they fill the template."""
    names = [CLASS_NAMES[i] for i in class_ids]
    return template.format(names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}")


def large_thing_image(index: int, size: int) -> CaptionedImage:
    """Picture ``index`` of the easy training stream: one thing that fills most of the picture, any ground."""
    rng = np.random.default_rng([LARGE_THINGS_STREAM, index])
    scene = render_scene(rng, size, size, num_things=(1, 1), thing_size=(0.6, 0.95))
    return CaptionedImage(scene.image, scene.class_ids[-1:])


def captioned_image(index: int, size: int) -> CaptionedImage:
    """Picture ``index`` of the training stream, ``size`` pixels a side.

    Two thirds show one thing, of any size up to nearly the whole picture; the rest stuffs alone, a thing that is named
    with its ground, or two to three things.
    """
    rng = np.random.default_rng([TRAINING_STREAM, index])
    side = 3 * size // 2
    kind = rng.random()
    if kind < 0.12:
        stuffs = [NUM_THINGS + int(i) for i in rng.permutation(NUM_CLASSES - NUM_THINGS)[: int(rng.integers(1, 3))]]
        scene = render_scene(rng, side, side, thing_ids=[], stuff_ids=stuffs)
        class_ids = tuple(stuffs)
    elif kind < 0.8:
        scene = render_scene(rng, side, side, num_things=(1, 1), thing_size=(0.16, 0.95))
        *grounds, last = scene.class_ids
        class_ids = (last, grounds[0]) if kind > 0.7 and len(grounds) == 1 else (last,)
    else:
        scene = render_scene(rng, side, side, num_things=(2, 3), num_stuffs=(1, 2), thing_size=(0.2, 0.6))
        class_ids = tuple(dict.fromkeys(class_id for class_id in scene.class_ids if class_id < NUM_THINGS))
        class_ids = class_ids or scene.class_ids[:1]
    return CaptionedImage(_shrink(scene.image, size), class_ids)


def zero_shot_image(index: int, size: int) -> CaptionedImage:
    """Picture ``index`` of the zero-shot test: one thing as :func:`render_scene` draws it in OVShapes, any ground."""
    rng = np.random.default_rng([ZERO_SHOT_STREAM, index])
    thing = index % NUM_THINGS
    side = int(rng.integers(128, 193))
    # A thing that found no place (it hardly happens) is tried again, not left out.
    while True:
        scene = render_scene(rng, side, side, thing_ids=[thing])
        if thing in scene.class_ids:
            return CaptionedImage(_shrink(scene.image, size), (thing,))


def _shrink(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
