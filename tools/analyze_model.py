"""Parameters, multiply-adds and activations of a model, by module.

    python tools/analyze_model.py --config-file configs/mta_clip/ade20k_RN50.yaml
    python tools/analyze_model.py --config-file configs/mask2former/ade20k_semantic_R50.yaml --size 1024 1024 --depth 3
    python tools/analyze_model.py --config-file configs/mta_clip/ade20k_RN50.yaml MODEL.OVSEG.MTA_CLIP.NUM_CONTEXTS 1

Weights are random, nothing is fetched. Counted are convolutions, matrix products and attention of one image in
evaluation, while the real code runs; one multiply-add is one, as in most papers' "FLOPs", and activations are the
numbers that these operations put out. Texts are encoded once a vocabulary, not once an image, so they stand apart.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ovseg_d2  # noqa: F401  (first: it hides a warning of detectron2's import)

# isort: split
import torch
from detectron2.modeling import build_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import ovseg_d2.data
import ovseg_d2.modeling  # noqa: F401  (registers the models)
from ovseg_d2.engine import one_line_errors
from ovseg_d2.engine.load_config import load_config
from ovseg_d2.structures import ImageBatch, MaskProposals, Vocabulary

#: Where models have their text tower.
TEXT = "clip.text"


class Prediction(nn.Module):
    """A model's ``predict`` as a forward, whose parts the counter tells apart."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: ImageBatch, vocabulary: Vocabulary) -> MaskProposals:
        return self.model.predict(images, vocabulary)


def analyze(model: nn.Module, *, size: tuple[int, int], num_classes: int) -> dict[str, dict[str, float]]:
    """``{module path: {"params", "trainable", "macs", "activations"}}``, in numbers; "" is the model itself.

    Args:
        model: a segmentor of this project.
        size: (height, width) of the image.
        num_classes: of a vocabulary of numbers, where the model brings none.
    """
    vocabulary = model.vocabulary
    if vocabulary is None:
        names = tuple(f"class {i}" for i in range(num_classes))
        vocabulary = Vocabulary(names=names, is_thing=(False,) * len(names))
    image = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0)).float()
    images = model.eval().preprocess([{"image": image, "height": size[0], "width": size[1]}])
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    model.requires_grad_(False)  # the counter's hooks stumble over views of parameters that have gradients
    outputs = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(flop_registry, _output_elements))
    with torch.no_grad(), FlopCounterMode(display=False) as products, outputs:
        Prediction(model)(images, vocabulary)
    counts, activations = products.get_flop_counts(), outputs.get_flop_counts()
    numbers = {}
    for path, module in model.named_modules():
        parameters = list(module.parameters())
        name = f"{Prediction.__name__}.model.{path}" if path else "Global"
        macs = sum(counts.get(name, {}).values()) / 2
        params = sum(parameter.numel() for parameter in parameters)
        trained = sum(parameter.numel() for parameter in parameters if parameter in trainable)
        numbers[path] = {
            "params": params,
            "trainable": trained,
            "macs": macs,
            "activations": sum(activations.get(name, {}).values()),
        }
    # What only holds modules, and is never called itself, has the work of those that it holds.
    idle = {path for path, values in numbers.items() if path and not values["macs"]}
    for path in reversed(numbers):  # those within others come first
        holder = path.rpartition(".")[0]
        if holder in idle:
            for key in ("macs", "activations"):
                numbers[holder][key] += numbers[path][key]
    return numbers


def _output_elements(*args: Any, out_shape: Any, **kwargs: Any) -> int:
    """In place of an operation's count of multiply-adds."""
    # Attention has more outputs than the one that the model sees.
    shape = out_shape[0] if out_shape and not isinstance(out_shape[0], int) else out_shape
    return math.prod(shape)


def rows(numbers: dict[str, dict[str, float]], depth: int) -> Iterator[tuple[str, dict[str, float]]]:
    """The modules with weights or work, down to ``depth`` names."""
    for path, values in numbers.items():
        if path and path.count(".") < depth and (values["params"] or values["macs"]):
            yield path, values


def report(numbers: dict[str, dict[str, float]], depth: int) -> str:
    lines = [f"{'module':<44}{'params M':>10}{'trainable M':>13}{'G multiply-adds':>17}{'M activations':>15}"]
    total, text = numbers[""], numbers.get(TEXT, {"macs": 0, "activations": 0})
    an_image = {key: total[key] - text[key] for key in ("macs", "activations")}
    for path, values in [*rows(numbers, depth), ("total, an image", {**total, **an_image})]:
        lines.append(
            f"{path:<44}{values['params'] / 1e6:>10.2f}{values['trainable'] / 1e6:>13.2f}"
            f"{values['macs'] / 1e9:>17.2f}{values['activations'] / 1e6:>15.2f}"
        )
    if text["macs"]:
        lines.append(
            f"{'text tower, once a vocabulary':<67}{text['macs'] / 1e9:>17.2f}{text['activations'] / 1e6:>15.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", type=Path, required=True, metavar="FILE", help="config of the model")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(512, 512), metavar=("HEIGHT", "WIDTH"), help="of the image (512 512)"
    )
    parser.add_argument(
        "--depth", type=int, default=2, help="parts that names of listed modules have at most (%(default)s)"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to change")
    args = parser.parse_args()
    cfg = load_config(args.config_file, args.opts)
    torch.manual_seed(0)
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    print(f"{args.config_file}, {args.size[0]} x {args.size[1]}")
    print(report(analyze(model, size=tuple(args.size), num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES), args.depth))


if __name__ == "__main__":
    with one_line_errors():
        main()
