#!/usr/bin/env python
"""Zero-shot test of a tiny CLIP of the model zoo: name the one thing in pictures of OVShapes, out of its 64.

    python tools/evaluate_tiny_clip.py --name OVShapes-RN
    python tools/evaluate_tiny_clip.py --name OVShapes-ViT --weights output/tiny_clip_vit/model.safetensors
    python tools/evaluate_tiny_clip.py --name OVShapes-RN --templates single --json output/zero_shot.json

Prints the share (percent) of pictures whose name, whose colour and whose shape is right. Chance is 1.6, 12.5 and 12.5.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ovseg_d2.data.datasets.ovshapes import CLASS_NAMES, is_seen
from ovseg_d2.data.datasets.ovshapes_captions import zero_shot_image
from ovseg_d2.data.datasets.ovshapes_scene import NUM_THINGS, SHAPES
from ovseg_d2.data.templates import get_templates
from ovseg_d2.evaluation.results import write_json
from ovseg_d2.modeling.clip.architectures import zoo_names
from ovseg_d2.modeling.clip.build import build_clip, clip_tokenizer, load_clip_pretrained
from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.clip.preprocess import normalise_image
from ovseg_d2.modeling.text_classifier import TextClassifier, averaged
from ovseg_d2.structures import Vocabulary


def _draw(index: int, size: int) -> tuple[np.ndarray, int]:
    example = zero_shot_image(index, size)
    return example.image, example.class_ids[0]


def draw_images(count: int, size: int, workers: int) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, size, size) uint8 and their classes (count,); the same ones every time."""
    draw = partial(_draw, size=size)
    bar = partial(tqdm, total=count, desc="drawing", unit="image")
    if workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            drawn = list(bar(pool.imap(draw, range(count), chunksize=16)))
    else:
        drawn = [draw(i) for i in bar(range(count))]
    images, labels = zip(*drawn, strict=True)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


@torch.no_grad()
def guesses(clip: Clip, classifier: TextClassifier, images: Tensor, *, batch: int = 64) -> Tensor:
    """The likeliest thing (n,) of pictures (n, 3, H, W) uint8."""
    things = Vocabulary(names=CLASS_NAMES[:NUM_THINGS], is_thing=(True,) * NUM_THINGS)
    text = averaged(classifier(clip.text, things)).embeds[:, 0]
    found = []
    for chunk in tqdm(images.split(batch), desc="naming", unit="batch"):
        embeds = clip.visual(normalise_image(chunk.to(text.device))).image_embeds
        found.append((F.normalize(embeds.float(), dim=-1) @ text.T).argmax(-1).cpu())
    return torch.cat(found)


def zero_shot_scores(guess: Tensor, labels: Tensor) -> dict[str, float]:
    """Percent of right names, colours and shapes; of names also among seen and unseen classes alone."""
    right = guess == labels
    seen = torch.tensor([is_seen(i) for i in range(NUM_THINGS)])[labels]
    shapes = len(SHAPES)
    marks = {
        "top1": right,
        "color": guess // shapes == labels // shapes,
        "shape": guess % shapes == labels % shapes,
        "top1_seen": right[seen],
        "top1_unseen": right[~seen],
    }
    return {name: 100 * float(mark.float().mean()) for name, mark in marks.items()}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, choices=zoo_names(), help="the model")
    parser.add_argument("--weights", default="ovshapes", metavar="FILE", help="default: those that ship with the model")
    parser.add_argument(
        "--templates", nargs="+", default=["vild"], metavar="SET", help="template sets or sentences (default: vild)"
    )
    parser.add_argument("--images", type=int, default=1000, help="pictures (default: %(default)s)")
    parser.add_argument(
        "--size",
        type=int,
        default=128,
        help="pixels a side of the pictures that CLIP sees (default: %(default)s; at 64, the size of the training "
        "pictures, the smallest things are 10 pixels wide)",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that draw (default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error(f"--images is {args.images}; expected 1 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the test; the exit code is 2 for weights or templates that cannot be used."""
    args = parse_args(argv)
    try:
        classifier = TextClassifier(tokenizer=clip_tokenizer(args.name), templates=get_templates(args.templates))
        clip = build_clip(args.name)
        source = load_clip_pretrained(clip, args.name, args.weights)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    clip.to(args.device).eval().requires_grad_(False)
    images, labels = draw_images(args.images, args.size, args.workers)
    scores = zero_shot_scores(guesses(clip, classifier.eval(), images), labels)
    print(f"{source}\n{args.images} pictures of {args.size} x {args.size}, percent")
    for name, value in scores.items():
        print(f"  {name:12} {value:5.1f}")
    if args.json:
        settings = {"name": args.name, "weights": args.weights, "images": args.images, "size": args.size}
        write_json(args.json, settings | scores)
    return 0


if __name__ == "__main__":
    sys.exit(main())
