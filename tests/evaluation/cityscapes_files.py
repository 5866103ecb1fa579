"""A Cityscapes of a few generated street scenes, in the official layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

Array = np.ndarray
#: Official ids of what the scenes show: road, building, traffic sign, sky, person, car; and of what is never evaluated.
EVALUATED = (7, 11, 20, 23, 24, 26)
UNLABELLED = (0, 4)
#: Those with instances.
THINGS = (24, 26)
SIZE = (48, 96)
CITIES = ("aachen", "bonn")


def write_cityscapes(root: Path, *, seed: int = 0, split: str = "val") -> None:
    """Two cities with a picture each: ``leftImg8bit/val``, and ``gtFine/val`` with all that belongs there."""
    from cityscapesscripts.helpers.labels import id2label

    rng = np.random.default_rng(seed)
    to_train_id = np.array([id2label[i].trainId % 256 for i in range(34)], np.uint8)
    for city in CITIES:
        images, labels = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        name = f"{city}_000000_000019"
        ids, instances = scene(rng)
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(images / f"{name}_leftImg8bit.png")
        for kind, array in (("labelIds", ids), ("labelTrainIds", to_train_id[ids]), ("instanceIds", instances)):
            Image.fromarray(array).save(labels / f"{name}_gtFine_{kind}.png")
        content = {"imgHeight": SIZE[0], "imgWidth": SIZE[1], "objects": []}
        (labels / f"{name}_gtFine_polygons.json").write_text(json.dumps(content))


def scene(rng: np.random.Generator) -> tuple[Array, Array]:
    """Ids (H, W) uint8 of blocks of 12 x 12 pixels, and ids of instances (H, W) uint16 in Cityscapes's code."""
    blocks = rng.choice([*EVALUATED, *UNLABELLED], (SIZE[0] // 12, SIZE[1] // 12)).astype(np.uint16)
    blocks.flat[: len(EVALUATED)] = EVALUATED
    is_thing = np.isin(blocks, THINGS)
    instances = blocks.copy()
    instances[is_thing] = blocks[is_thing] * 1000 + np.arange(is_thing.sum())
    ids, instances = (np.kron(array, np.ones((12, 12), np.uint16)).astype(np.uint16) for array in (blocks, instances))
    return ids.astype(np.uint8), instances
