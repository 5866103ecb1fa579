"""Figures of what a model does inside, as papers have them.

    F="--config-file configs/ovshapes/fcclip.yaml --output output/figures"
    W="MODEL.WEIGHTS output/quickstart/training/model_final.pth"
    python tools/visualize_model.py --figure cards $F $W
    python tools/visualize_model.py --figure embeddings --points masks --images 40 $F $W
    python tools/visualize_model.py --figure similarity --words "red star, grass" --output output/figures \\
        --config-file configs/ovshapes/training_free_dense.yaml
    python tools/visualize_model.py --figure pseudo-masks --output output/figures \\
        --config-file configs/ovshapes/fga_seg.yaml MODEL.WEIGHTS model_final.pth

figure        what                                                                        models
cards         the best masks of a picture, those like an annotated one first, with        those that name masks
              their --top classes, by classifier
similarity    where CLIP, the decoder's attention and the result see each of the --words  with dense features of CLIP
pseudo-masks  FGA-seg's global and local category supplementation for the --words         FGASeg, CATSeg
embeddings    t-SNE of masks (--points masks) or CLIP's pixels (pixels) of --images       with a CLIP; which points
              pictures with true classes, beside the texts of these                       depends on the model

Pictures are the first ones of --dataset (default: the first of DATASETS.TEST), or files (--input; not for embeddings).
Right and wrong is by the annotation, which maps show as outlines; a star marks classes that are unseen in training.
Words that are no classes of the dataset join its vocabulary; without --words they are the classes that the picture has.
A model without what a figure needs is an error of one line, which says the figures that it has. t-SNE is exact and in
this package (inspection/tsne.py): it needs no other one, and the same points give the same picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ovseg_d2  # noqa: F401  (first: it hides a warning of detectron2's import)

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from fvcore.transforms.transform import NoOpTransform, TransformList
from torch import Tensor, nn

import ovseg_d2.modeling  # noqa: F401  (registers the models)
from ovseg_d2.data import OVSegDatasetMapper
from ovseg_d2.data.annotation_masks import annotation_segments
from ovseg_d2.data.annotations import DatasetInfo, best_targets, with_size
from ovseg_d2.data.check import load_dataset_dicts
from ovseg_d2.data.image_io import read_image
from ovseg_d2.data.vocabulary import vocabulary_from_metadata, vocabulary_from_string
from ovseg_d2.engine import load_model
from ovseg_d2.engine.load_config import load_config
from ovseg_d2.engine.setup import available_device
from ovseg_d2.inspection.available import require_figure
from ovseg_d2.inspection.embeddings import class_texts, labelled_masks, labelled_pixels
from ovseg_d2.inspection.figures import DPI, embedding_scatter, heat_maps, proposal_cards
from ovseg_d2.inspection.maps import on_image, pseudo_masks, similarity_maps
from ovseg_d2.inspection.masks import best_masks, mask_opinions, true_classes
from ovseg_d2.inspection.tsne import tsne
from ovseg_d2.structures import Vocabulary
from ovseg_d2.visualization import ResultDrawer

MAX_WORDS = 6
Record = dict[str, Any]


def cards(
    model: nn.Module, x: Record, vocabulary: Vocabulary, path: Path, *, info: DatasetInfo, masks: int, top: int
) -> None:
    images = model.preprocess([x])
    opinions = mask_opinions(model, images, vocabulary)
    found = opinions.masks(0, (x["height"], x["width"]))
    scores = list(opinions.probs.values())[-1][0, :, : len(vocabulary)].amax(-1)
    known = None
    if best_targets(x) is not None:
        known = true_classes(found, *truth(x, info))
        scores = scores + (known >= 0)
    chosen = best_masks(found, scores.masked_fill(~opinions.valid[0], -1.0), masks)
    if not chosen:
        raise ValueError(f"{x['file_name']}: the model has no mask that covers half a percent of the picture")
    probs: dict[str, Tensor] = {}
    for name, values in opinions.probs.items():
        # An ensemble in which one classifier has all the weight says the same again.
        if not any(
            values.shape == other.shape and torch.allclose(values, other, atol=1e-5) for other in probs.values()
        ):
            probs[name] = values
    probs = {name: values[0, chosen] for name, values in probs.items()}
    image = read_image(x["file_name"], "RGB")
    unseen = {k for k, seen in enumerate(vocabulary.is_seen) if not seen}
    options = {"top": top, "truth": None if known is None else known[chosen].tolist(), "unseen": unseen}
    figure = proposal_cards(image, found[chosen], probs, vocabulary.names, **options)
    figure.savefig(path, dpi=DPI)


def word_maps(
    model: nn.Module,
    x: Record,
    vocabulary: Vocabulary,
    path: Path,
    *,
    info: DatasetInfo,
    words: Sequence[str],
    pseudo: bool,
) -> None:
    images = model.preprocess([x])
    maps = (pseudo_masks if pseudo else similarity_maps)(model, images, vocabulary)
    rows = [vocabulary.names.index(word) for word in words]
    size = (x["height"], x["width"])
    shown = {name: on_image(values[0, rows], images, 0, size) for name, values in maps.items()}
    outlines: list[Tensor | None] = [None] * len(words)
    if best_targets(x) is not None:
        ids, masks = truth(x, info)
        outlines = [masks[ids == k].any(dim=0) if (ids == k).any() else None for k in rows]
    heat_maps(read_image(x["file_name"], "RGB"), shown, words, outlines=outlines).savefig(path, dpi=DPI)


def embeddings(model: nn.Module, inputs: Sequence[Record], vocabulary: Vocabulary, path: Path, **options: Any) -> None:
    """Options: points, max_points, perplexity, name (of the config)."""
    info = DatasetInfo.from_name(inputs[0]["dataset_name"])
    parts: list[tuple[Tensor, Tensor]] = []
    for x in inputs:
        images, (ids, masks) = model.preprocess([x]), truth(x, info)
        if options["points"] == "masks":
            parts.append(labelled_masks(model, images, vocabulary, [ids], [masks]))
        else:
            parts.append(labelled_pixels(model, images, [ids], [masks]))
    points, labels = (torch.cat([column.cpu() for column in columns]) for columns in zip(*parts, strict=True))
    if len(points) < 3:
        raise ValueError(
            f"{len(points)} {options['points']} of {len(inputs)} pictures have a class of the annotation; expected 3 "
            "or more, so more --images"
        )
    texts = class_texts(model, model.preprocess(inputs[:1]), vocabulary).cpu()
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    keep = order[: options["max_points"]].sort().values
    points, labels = points[keep], labels[keep]
    present = labels.unique().tolist() if len(texts) else []
    flat = tsne(torch.cat([points, texts[present]]), perplexity=options["perplexity"])
    title = f"{options['name']}: {len(points)} {options['points']} of {len(inputs)} pictures; stars are texts"
    drawer = ResultDrawer.from_metadata(MetadataCatalog.get(inputs[0]["dataset_name"]))
    colors = drawer.class_colors if drawer.class_names == vocabulary.names else None
    shown, stars = flat[: len(points)], flat[len(points) :]
    figure = embedding_scatter(shown, labels, stars, present, vocabulary.names, title=title, class_colors=colors)
    figure.savefig(path, dpi=DPI)


def truth(x: Record, info: DatasetInfo) -> tuple[Tensor, Tensor]:
    """Classes (M,) and masks (M, H, W) bool of a picture's annotation, at the picture's size."""
    size = (x["height"], x["width"])
    return annotation_segments(with_size(x, size), info, TransformList([NoOpTransform()]), size)


def load_inputs(cfg: CfgNode, args: argparse.Namespace, dataset: str) -> list[Record]:
    """What the evaluation's mapper makes of the pictures, with ``height`` and ``width`` of the files."""
    if args.input:
        records = [{"file_name": str(path), "dataset_name": dataset} for path in args.input]
    else:
        records = load_dataset_dicts(dataset, filter_empty=False)
        if not 0 <= args.start < len(records):
            raise ValueError(f"--start is {args.start}; dataset {dataset!r} has pictures 0 to {len(records) - 1}")
        records = records[args.start : args.start + args.images]
    mapper = OVSegDatasetMapper(cfg, is_train=False, dataset_names=dataset)
    return [x for x in map(mapper, records) if x is not None]


def chosen_vocabulary(dataset: str, words: Sequence[str]) -> Vocabulary:
    """The classes of the dataset, and what of the words is not among them."""
    vocabulary = vocabulary_from_metadata(MetadataCatalog.get(dataset))
    new = [word for word in words if word not in vocabulary.names]
    return replace(
        vocabulary,
        names=(*vocabulary.names, *new),
        is_thing=(*vocabulary.is_thing, *(True for _ in new)),
        synonyms=(*vocabulary.synonyms, *((word,) for word in new)),
        is_seen=(*vocabulary.is_seen, *(False for _ in new)) if vocabulary.is_seen else (),
    )


def words_of(x: Record, vocabulary: Vocabulary, info: DatasetInfo) -> tuple[str, ...]:
    """The classes that a picture has in truth.

    Raises:
        ValueError: it has no annotation.
    """
    if best_targets(x) is None:
        raise ValueError(f"{x['file_name']} has no annotation that names its classes; expected --words")
    return tuple(vocabulary.names[k] for k in truth(x, info)[0].unique().tolist()[:MAX_WORDS])


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: see the module's last paragraph, and what the config and the dataset may lack.
    """
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE)
    dataset = args.dataset or next(iter(cfg.DATASETS.TEST), None)
    if dataset is None:
        raise ValueError("DATASETS.TEST is empty; expected a --dataset")
    if args.figure == "embeddings" and args.input:
        raise ValueError("--input: embeddings need pictures with an annotation; expected a --dataset")
    words = vocabulary_from_string(args.words).names if args.words else ()
    vocabulary, info = chosen_vocabulary(dataset, words), DatasetInfo.from_name(dataset)
    model, inputs = load_model(cfg), load_inputs(cfg, args, dataset)
    if not inputs:
        raise ValueError(f"none of the {args.images} pictures of {dataset!r} can be decoded")
    require_figure(model, f"{args.figure} --points {args.points}" if args.figure == "embeddings" else args.figure)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.figure == "embeddings":
        path = args.output / f"embeddings_{args.points}.png"
        name = args.config_file.stem
        options = {"points": args.points, "max_points": args.max_points, "perplexity": args.perplexity, "name": name}
        embeddings(model, inputs, vocabulary, path, **options)
        print(path)
        return
    for x in inputs:
        path = args.output / f"{args.figure}_{Path(x['file_name']).stem}.png"
        if args.figure == "cards":
            cards(model, x, vocabulary, path, info=info, masks=args.masks, top=args.top)
        else:
            shown = words or words_of(x, vocabulary, info)
            word_maps(model, x, vocabulary, path, info=info, words=shown, pseudo=args.figure == "pseudo-masks")
        print(path)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", required=True, choices=("cards", "similarity", "pseudo-masks", "embeddings"))
    parser.add_argument("--config-file", required=True, type=Path)
    parser.add_argument("--dataset", help="a registered dataset; default: the first of DATASETS.TEST")
    parser.add_argument("--input", nargs="+", type=Path, metavar="FILE", help="pictures in place of the dataset's")
    parser.add_argument("--images", type=int, default=2, help="how many of the dataset (default %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="the first of them (default %(default)s)")
    parser.add_argument("--words", default="", help="between commas; for similarity and pseudo-masks")
    parser.add_argument("--masks", type=int, default=5, help="of a picture, for cards (default %(default)s)")
    parser.add_argument("--top", type=int, default=5, help="classes of a mask, for cards (default %(default)s)")
    parser.add_argument("--points", choices=("masks", "pixels"), default="pixels", help="for embeddings")
    parser.add_argument("--max-points", type=int, default=1000, help="for embeddings (default %(default)s)")
    parser.add_argument("--perplexity", type=float, default=20.0, help="of t-SNE (default %(default)s)")
    parser.add_argument("--output", required=True, type=Path, help="a folder for the PNGs")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that change the config")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
