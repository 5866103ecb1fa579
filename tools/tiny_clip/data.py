"""Pictures and captions of OVShapes, and what changes of them from step to step."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ovseg_d2.data.datasets.ovshapes import CLASS_NAMES
from ovseg_d2.data.datasets.ovshapes_captions import (
    CAPTION_TEMPLATES,
    caption_text,
    captioned_image,
    large_thing_image,
    zero_shot_image,
)

MAX_NAMES = 3  # classes that one caption names at most


def load_pool(folder: Path, kind: str, count: int, size: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (count, size, size, 3) uint8 and class ids (count, MAX_NAMES) int64 or -1; drawn if not on disk.

    Args:
        kind: "large" (one large thing each) or "mixed".
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{kind}_{part}_{size}_{count}.npy" for part in ("images", "labels")]
    if not all(file.exists() for file in files):
        images = np.zeros((count, size, size, 3), np.uint8)
        labels = np.full((count, MAX_NAMES), -1, np.int64)
        draw = partial(_draw, kind=kind, size=size)
        with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else nullcontext() as pool:
            drawn = pool.imap(draw, range(count), chunksize=64) if pool else map(draw, range(count))
            for i, (image, classes) in enumerate(tqdm(drawn, total=count, desc=f"drawing ({kind})", mininterval=10)):
                images[i], labels[i] = image, classes
        for file, array in zip(files, (images, labels), strict=True):
            np.save(file.with_suffix(".part.npy"), array)
            os.replace(file.with_suffix(".part.npy"), file)
    return np.load(files[0], mmap_mode="r"), np.load(files[1])


def _draw(index: int, kind: str, size: int) -> tuple[np.ndarray, list[int]]:
    example = (large_thing_image if kind == "large" else captioned_image)(index, size)
    return example.image, [*example.class_ids, *[-1] * MAX_NAMES][:MAX_NAMES]


def zero_shot_pictures(count: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pictures (count, size, size, 3) uint8 of one thing each, and their classes (count,)."""
    examples = [zero_shot_image(i, size) for i in range(count)]
    images = torch.from_numpy(np.stack([x.image for x in examples])).to(device)
    return images, torch.tensor([x.class_ids[0] for x in examples], device=device)


def augment(images: Tensor, size: int, *, seed: int) -> Tensor:
    """Scale, move and mirror pictures (B, S, S, 3) uint8 -> (B, 3, size, size) float in [0, 255]."""
    generator = torch.Generator().manual_seed(seed)
    n, full = images.shape[0], images.shape[1]
    scale = torch.empty(n).uniform_(0.8, 1.1, generator=generator) * size / full
    flip = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    room = (1 - scale).clamp(min=0)[:, None]
    shift = (2 * torch.rand(n, 2, generator=generator) - 1) * room
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * flip, scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False).to(images.device)
    pixels = images.permute(0, 3, 1, 2).float()
    return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


class CaptionSampler:
    """Captions of a batch: all 72 names, each in a random template, and the sentences that name several classes.

    Every picture is contrasted with all names, not only with those of its batch: with 72 of them, a batch's own
    captions would mostly repeat.
    """

    def __init__(self, tokenizer: open_clip.SimpleTokenizer, device: torch.device) -> None:
        self.tokenizer = tokenizer
        self.device = device
        self.cache: dict[str, Tensor] = {}

    def __call__(self, labels: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """labels (B, MAX_NAMES) -> tokens (T, 77), targets (B,) in [0, T)."""
        sets: dict[tuple[int, ...], int] = {(i,): i for i in range(len(CLASS_NAMES))}
        targets = [sets.setdefault(tuple(int(i) for i in row if i >= 0), len(sets)) for row in labels]
        templates = rng.integers(0, len(CAPTION_TEMPLATES), len(sets))
        texts = [caption_text(ids, CAPTION_TEMPLATES[t]) for ids, t in zip(sets, templates, strict=True)]
        missing = [text for text in texts if text not in self.cache]
        if missing:
            self.cache.update(zip(missing, self.tokenizer(missing), strict=True))
        tokens = torch.stack([self.cache[text] for text in texts])
        return tokens.to(self.device), torch.tensor(targets, device=self.device)
