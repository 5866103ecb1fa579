#!/usr/bin/env python
"""Self-training: a model names what the labels of its training images leave out (MAFT, arXiv 2310.00240, appendix C.2).

    # labels for the unseen classes, by any model: its config, its weights
    python tools/self_train.py --config-file configs/ovshapes/maft.yaml --output output/pseudo \\
        --retrain-config configs/ovshapes/host.yaml MODEL.WEIGHTS output/model_final.pth

    # the host again, with them
    python train_net.py --config-file output/pseudo/pseudo.yaml

Pixels that are labelled with a seen class keep their label. Any other pixel gets the class that the model finds the
most likely of all, if that is an unseen one (and, with --threshold, certain enough); else it stays without a label.
Labels of unseen classes that are in the files are not looked at.

OUTPUT/labels gets a PNG an image in the numbers of all classes, seen and unseen, 16 bits deep where they need it, and
OUTPUT/pseudo.yaml a config that is based on --retrain-config, registers these labels as NAME_pseudo and trains on them.
A model that reads its masks from files needs them for the new name, too (tools/export_proposals.py). A run that was
interrupted goes on where it stopped. At the end the pixels and images of every unseen class are listed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ovseg_d2  # noqa: F401  (first: it hides a warning of detectron2's import)

# isort: split
import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import ovseg_d2.modeling  # noqa: F401  registers the models
from ovseg_d2.checkpoint.io import atomic_write
from ovseg_d2.data import OVSegDatasetMapper
from ovseg_d2.data.check import load_dataset_dicts, require_registered
from ovseg_d2.data.datasets import dataset_root
from ovseg_d2.data.image_io import read_image
from ovseg_d2.data.label_files import labelled_pixels
from ovseg_d2.data.label_map import class_of_label
from ovseg_d2.data.vocabulary import vocabulary_from_metadata
from ovseg_d2.engine import load_model
from ovseg_d2.engine.fingerprint import model_fingerprint
from ovseg_d2.engine.load_config import load_config
from ovseg_d2.engine.setup import available_device
from ovseg_d2.evaluation.results import write_json
from ovseg_d2.evaluation.sem_seg import load_semantic_ground_truth
from ovseg_d2.structures import Vocabulary

Array = np.ndarray
Record = dict[str, Any]


def split_vocabulary(name: str) -> Vocabulary:
    """All classes of a dataset, which has to have a zero-shot split.

    Raises:
        ValueError: it has none, or no class of it is unseen.
    """
    require_registered(name)
    vocabulary = vocabulary_from_metadata(MetadataCatalog.get(name))
    if not vocabulary.is_seen:
        raise ValueError(f"dataset {name!r} has no class_is_seen, which says what is seen; give --classes another one")
    if all(vocabulary.is_seen):
        raise ValueError(f"dataset {name!r} has no unseen class; give --classes one with the seen and the unseen")
    return vocabulary


def label_table(name: str, vocabulary: Vocabulary, ignore_label: int) -> Array:
    """(K', ) the class in ``vocabulary`` of each class of the dataset ``name``; ``ignore_label`` for unseen ones.

    Raises:
        ValueError: a class that is not in the vocabulary.
    """
    position = {class_name: i for i, class_name in enumerate(vocabulary.names)}
    names = vocabulary_from_metadata(MetadataCatalog.get(name)).names
    missing = [class_name for class_name in names if class_name not in position]
    if missing:
        raise ValueError(
            f"dataset {name!r} has {len(missing)} classes that are not among those of --classes, the first is "
            f"{missing[0]!r}"
        )
    ids = np.array([position[class_name] for class_name in names])
    return np.where(np.array(vocabulary.is_seen)[ids], ids, ignore_label)


def pseudo_labels(
    labels: Array, scores: Tensor, is_seen: Sequence[bool], *, ignore_label: int, threshold: float
) -> Array:
    """Fill what has no label with unseen classes.

    Args:
        labels: (H, W) seen classes, or ``ignore_label``.
        scores: (K, H, W) of the model, of all classes.
        threshold: the least share that a class must have of the scores of all classes at its pixel.

    Returns:
        (H, W).
    """
    best, found = scores.max(dim=0)
    # Where no mask is, all scores are 0.
    sure = ~torch.tensor(is_seen, device=found.device)[found] & (best > 0)
    if threshold > 0:
        sure &= best >= threshold * scores.clamp(min=0).sum(dim=0)
    filled = np.where(sure.cpu().numpy(), found.cpu().numpy(), ignore_label)
    return np.where(labels == ignore_label, filled, labels)


def write_labels(
    cfg: CfgNode, model: nn.Module, name: str, folder: Path, vocabulary: Vocabulary, threshold: float
) -> Array:
    """Write the images that are not there yet.

    Returns:
        (K, 2) int64: pixels and images of each class in all files.

    Raises:
        ValueError: a model that does not answer with all classes.
    """
    ignore_label = ignore_label_of(vocabulary)
    metadata = MetadataCatalog.get(name)
    own_ignore_label = getattr(metadata, "ignore_label", 255)
    table = label_table(name, vocabulary, ignore_label)
    labels_of = class_of_label(metadata)
    mapper = OVSegDatasetMapper(cfg, is_train=False, dataset_names=name)
    records = load_dataset_dicts(name, filter_empty=False)
    image_root_of(records)
    counts = np.zeros((len(vocabulary), 2), np.int64)
    done = {path.name for path in folder.glob("*.png")}
    for record in tqdm(records, desc=f"{name}, {len(done)} there already", unit="image"):
        path = folder / f"{Path(record['file_name']).stem}.png"
        if path.name in done:
            labels = read_image(str(path)).astype(np.int64)
        else:
            x = mapper(record)
            if x is None:  # TEST.ON_CORRUPT_IMAGE skip
                continue
            given, source = load_semantic_ground_truth(record, ignore_label=own_ignore_label, class_of_label=labels_of)
            labels = relabelled(given, table, own_ignore_label, ignore_label, source)
            with torch.no_grad():
                scores = model([{**x, "vocabulary": vocabulary}])[0]["sem_seg"]
            if scores.shape != (len(vocabulary), *labels.shape):
                raise ValueError(
                    f"{type(model).__name__} gives scores {tuple(scores.shape)} for {record['file_name']}, expected "
                    f"{(len(vocabulary), *labels.shape)}; a model of a closed vocabulary knows no unseen classes"
                )
            labels = pseudo_labels(labels, scores, vocabulary.is_seen, ignore_label=ignore_label, threshold=threshold)
            with atomic_write(path) as file:
                Image.fromarray(labels.astype(np.uint8 if ignore_label < 256 else np.uint16)).save(file, format="PNG")
        pixels = np.bincount(labels[labels != ignore_label], minlength=len(vocabulary))
        counts += np.stack([pixels, pixels > 0], axis=1)
    return counts


def relabelled(given: Array, table: Array, own_ignore_label: int, ignore_label: int, source: str) -> Array:
    """Labels (H, W) of a dataset in the numbers of ``table``.

    Raises:
        ValueError: a label that the dataset does not have.
    """
    try:
        valid = labelled_pixels(given, len(table), own_ignore_label)
    except ValueError as error:
        raise ValueError(f"{source} has {error}") from error
    labels = np.full(given.shape, ignore_label)
    labels[valid] = table[given[valid]]
    return labels


def ignore_label_of(vocabulary: Vocabulary) -> int:
    """255, and 65535 where 255 is a class."""
    return 255 if len(vocabulary) <= 255 else 65535


def image_root_of(records: Sequence[Record]) -> str:
    """The folder of all images.

    Raises:
        ValueError: they are in several, or two have one name.
    """
    folders = sorted({os.path.dirname(record["file_name"]) for record in records})
    if len(folders) > 1:
        raise ValueError(f"the images lie in {len(folders)} folders, {folders[0]} and others; expected one")
    stems = [Path(record["file_name"]).stem for record in records]
    if len(set(stems)) < len(stems):
        raise ValueError(
            f"two images in {folders[0]} differ in their suffix alone; label files need names of their own"
        )
    return folders[0]


def retrain_config(config: Path, records: Sequence[Record], name: str, folder: Path, vocabulary: Vocabulary) -> str:
    """A config, as YAML, that trains what ``config`` describes on the labels in ``folder``."""
    ignore_label = ignore_label_of(vocabulary)
    entry: dict[str, Any] = {
        "kind": "semantic",
        "name": name,
        "image_root": _from_root(image_root_of(records)),
        "semantic_root": _from_root(folder),
        "ignore_label": ignore_label,
        "classes": list(vocabulary.names),
        "class_is_seen": list(vocabulary.is_seen),
    }
    if any(synonyms != (own,) for own, synonyms in zip(vocabulary.names, vocabulary.synonyms, strict=True)):
        entry["class_synonyms"] = [list(synonyms) for synonyms in vocabulary.synonyms]
    # A list in a file replaces that of the file that it is based on.
    others = [dict(other) for other in load_config(config).DATASETS.REGISTER if other["name"] != name]
    content: dict[str, Any] = {
        "_BASE_": str(config.resolve()),
        "DATASETS": {"REGISTER": [*others, entry], "TRAIN": [name]},
        "INPUT": {"TARGETS": "semantic"},
        "MODEL": {
            "SEM_SEG_HEAD": {"NUM_CLASSES": len(vocabulary), "IGNORE_VALUE": ignore_label},
            "OVSEG": {"FROZEN_CLIP": {"TRAIN_TASKS": ["semantic"]}},
        },
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


def _from_root(path: str | Path) -> str:
    """Relative to DETECTRON2_DATASETS, where it lies in there."""
    path, root = Path(path).resolve(), Path(dataset_root()).resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def check_folder(folder: Path, header: dict[str, Any]) -> None:
    """Claim ``folder`` for the labels that ``header`` describes.

    Raises:
        ValueError: it holds those of another model or dataset.
    """
    path = folder / "source.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key in header if found.get(key) != header[key]]
        if different:
            key = different[0]
            raise ValueError(
                f"{folder} holds labels of {key} {found.get(key)!r}, not {header[key]!r}; give another folder, or "
                "delete it"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files; give another folder")
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    write_json(path, header)


def summary(counts: Array, vocabulary: Vocabulary) -> str:
    """A line an unseen class."""
    rows = [(i, *counts[i].tolist()) for i, seen in enumerate(vocabulary.is_seen) if not seen]
    width = max(len(vocabulary.names[i]) for i, *_ in rows)
    lines = [f"{'unseen class':<{max(width, 12)}}  {'pixels':>12}  {'images':>8}"]
    lines += [f"{vocabulary.names[i]:<{max(width, 12)}}  {pixels:>12}  {images:>8}" for i, pixels, images in rows]
    pseudo, given = sum(row[1] for row in rows), int(counts[np.array(vocabulary.is_seen), 0].sum())
    lines.append(f"{pseudo} pixels of {len(rows)} unseen classes beside {given} labelled ones")
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", type=Path, required=True, metavar="FILE", help="config of the model that labels"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where labels and config go")
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="training images, labelled with seen classes (default: the first of DATASETS.TRAIN)",
    )
    parser.add_argument(
        "--classes",
        metavar="NAME",
        help="dataset that names all classes and says which are seen (default: the first of DATASETS.TEST)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.0,
        metavar="P",
        help="least share of a class in the scores of all at its pixel, 0 to 1",
    )
    parser.add_argument(
        "--retrain-config", type=Path, metavar="FILE", help="what pseudo.yaml is based on (default: --config-file)"
    )
    parser.add_argument("--name", help="of the new dataset (default: that of the images with _pseudo)")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change, behind all options")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the labels; the exit code is 2 for wrong arguments or files."""
    args = parse_args(argv)
    try:
        if not 0 <= args.threshold <= 1:
            raise ValueError(f"--threshold is {args.threshold}; expected a share from 0 to 1")
        cfg = load_config(args.config_file, [*args.opts, "MODEL.OVSEG.TEST.TASKS", '["semantic"]'])
        cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE)
        for option, key, names in (
            ("dataset", "TRAIN", cfg.DATASETS.TRAIN),
            ("classes", "TEST", cfg.DATASETS.TEST),
        ):
            if not getattr(args, option) and not names:
                raise ValueError(f"--{option} is not given and DATASETS.{key} is empty; expected a registered dataset")
        name, classes = args.dataset or cfg.DATASETS.TRAIN[0], args.classes or cfg.DATASETS.TEST[0]
        require_registered(name)
        vocabulary = split_vocabulary(classes)
        label_table(name, vocabulary, ignore_label_of(vocabulary))
        retrain = args.retrain_config or args.config_file
        if retrain.resolve() == (args.output / "pseudo.yaml").resolve():
            raise ValueError(f"--retrain-config {retrain} is the file that this run writes; expected another")
        load_config(retrain)
        model = load_model(cfg)

        header = {"dataset": name, "classes": classes, "threshold": args.threshold}
        check_folder(args.output, {**header, "model": model_fingerprint(cfg, model)})
        counts = write_labels(cfg, model, name, args.output / "labels", vocabulary, args.threshold)
        records = load_dataset_dicts(name, filter_empty=False)
        text = retrain_config(retrain, records, args.name or f"{name}_pseudo", args.output / "labels", vocabulary)
        with atomic_write(args.output / "pseudo.yaml") as file:
            file.write(text.encode())
        print(text)
        print(summary(counts, vocabulary))
        print(f"python train_net.py --config-file {args.output / 'pseudo.yaml'}")
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
