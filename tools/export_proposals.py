#!/usr/bin/env python
"""Write the masks of a mask generator to files, once, so that other models can start from them without running it.

    python tools/export_proposals.py --config-file CONFIG.yaml --datasets ovshapes_train ovshapes_val \\
        --output output/proposals MODEL.WEIGHTS model.pth

    # a model that reads them
    python train_net.py --config-file OTHER.yaml MODEL.OVSEG.PROPOSALS.NAME PrecomputedProposals \\
        MODEL.OVSEG.PROPOSALS.FILES output/proposals

    # the masks of the annotations themselves: upper bounds, or (regions) a stand-in for SAM's masks
    python tools/export_proposals.py --config-file CONFIG.yaml --from-annotations segments --datasets ovshapes_val \\
        --output output/segments

Each dataset gets a file OUTPUT/NAME.jsonl: masks (probability above one half) at the size of the image, as COCO's run
lengths, and their scores if the generator has any (one minus the probability of "no object"). An export that was
interrupted goes on where it stopped. For datasets with panoptic annotations the mean over all ground-truth segments of
the best IoU with any mask is printed at the end, in percent.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ovseg_d2  # noqa: F401  (first: it hides a warning of detectron2's import)

# isort: split
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import ovseg_d2.modeling  # noqa: F401  registers the models
from ovseg_d2.data import OVSegDatasetMapper
from ovseg_d2.data.annotation_masks import KINDS, annotation_masks
from ovseg_d2.data.check import load_dataset_dicts, require_registered
from ovseg_d2.data.dataset_mapper import DatasetInfo
from ovseg_d2.data.proposal_files import ProposalReader, ProposalWriter, proposal_path
from ovseg_d2.data.vocabulary import vocabulary_from_metadata
from ovseg_d2.engine import load_parts
from ovseg_d2.engine.fingerprint import model_fingerprint
from ovseg_d2.engine.load_config import load_config
from ovseg_d2.engine.setup import available_device
from ovseg_d2.evaluation.mask_recall import MaskRecall
from ovseg_d2.evaluation.panoptic_png import read_panoptic_png
from ovseg_d2.evaluation.results import results_table, write_json
from ovseg_d2.modeling.inference.mask_inference import crop_and_resize
from ovseg_d2.modeling.meta_arch.mta_clip import MTACLIP
from ovseg_d2.modeling.meta_arch.open_vocabulary import ClipSegmentor
from ovseg_d2.modeling.text_classifier import averaged
from ovseg_d2.structures import MaskProposals, Vocabulary

Record = dict[str, Any]
#: A record -> its masks (Q, H, W) bool and their scores, if there are any; None for an image that is left out.
Source = Callable[[Record], tuple[np.ndarray, Sequence[float] | None] | None]


def image_id_of(record: Record) -> int | str:
    """The id that the mapper gives."""
    return record.get("image_id", os.path.splitext(os.path.basename(record["file_name"]))[0])


@torch.no_grad()
def masks_of(model: nn.Module, x: Record, vocabulary: Vocabulary) -> tuple[Tensor, list[float] | None]:
    """Masks (Q, height, width) bool at the size of the image, and their scores if there are any."""
    images = model.preprocess([x])
    if isinstance(model, ClipSegmentor):
        images = model.generator_copy(images)
        # Scores of a text head depend on the classes, masks do not.
        text = averaged(model.text(vocabulary))
        proposals: MaskProposals = model.propose(model.proposals, images, text, vocabulary)
    elif isinstance(model, MTACLIP):
        proposals, _ = model.propose(images, vocabulary)  # the classes' texts are among the queries
    else:
        proposals = model.proposals(images)
    logits = F.interpolate(
        proposals.mask_logits.float(), size=images.padded_size, mode="bilinear", align_corners=False
    )[0]
    size = (x["height"], x["width"])
    masks = crop_and_resize(logits, image_size=images.image_sizes[0], output_size=size) > 0
    keep = masks.flatten(1).any(dim=1)
    if proposals.valid is not None:
        keep &= proposals.valid[0]
    scores = None
    if proposals.class_logits is not None:
        scores = (1 - proposals.class_logits[0].float().softmax(-1)[:, -1])[keep].tolist()
    return masks[keep], scores


def of_model(cfg: CfgNode, model: nn.Module, name: str) -> Source:
    """The masks that a model's generator makes of the images of a dataset."""
    mapper = OVSegDatasetMapper(cfg, is_train=False, dataset_names=name)
    vocabulary = vocabulary_from_metadata(MetadataCatalog.get(name))

    def source(record: Record) -> tuple[np.ndarray, Sequence[float] | None] | None:
        x = mapper(record)
        if x is None:  # TEST.ON_CORRUPT_IMAGE skip
            return None
        masks, scores = masks_of(model, x, vocabulary)
        return masks.cpu().numpy(), scores

    return source


def of_annotations(kind: str, name: str) -> Source:
    """The masks that the images of a dataset are annotated with."""
    info = DatasetInfo.from_name(name)
    return lambda record: (annotation_masks(record, info, kind), None)


def export(source: Source, name: str, path: Path, header: dict[str, Any]) -> None:
    """Append the masks of the images that are not in the file yet."""
    records = load_dataset_dicts(name, filter_empty=False)
    with ProposalWriter(path, {"dataset": name, **header}) as writer:
        todo = [record for record in records if image_id_of(record) not in writer.done]
        for record in tqdm(todo, total=len(records), initial=len(records) - len(todo), desc=name, unit="image"):
            found = source(record)
            if found is None:
                continue
            masks, scores = found
            file_name = os.path.basename(record["file_name"])
            writer.add(image_id=image_id_of(record), file_name=file_name, masks=masks, scores=scores)


def recall(name: str, path: Path) -> dict[str, float] | None:
    """Recall of the masks in a file; None for datasets without panoptic annotations."""
    records = load_dataset_dicts(name, filter_empty=False)
    if "pan_seg_file_name" not in records[0]:
        return None
    reader = ProposalReader(path)
    score = MaskRecall(vocabulary_from_metadata(MetadataCatalog.get(name)))
    for record in tqdm(records, desc=f"recall on {name}", unit="image"):
        image_id = image_id_of(record)
        if image_id in reader:
            ids = read_panoptic_png(record["pan_seg_file_name"])
            masks = reader.masks(image_id, ids.shape, name=record["file_name"])
            score.update(torch.from_numpy(masks).bool(), ids, record["segments_info"])
    return score.result()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the config of the generator's model")
    parser.add_argument(
        "--datasets", nargs="+", metavar="NAME", help="registered datasets (default: DATASETS.TRAIN and DATASETS.TEST)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the files go")
    parser.add_argument(
        "--from-annotations",
        choices=KINDS,
        help="no model: the annotated segments (classes, where there are none), or all connected regions",
    )
    parser.add_argument("--no-recall", action="store_true", help="do not compare with the ground truth")
    # Not a remainder: --datasets takes all words up to the next option, so that --output has to stand between.
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change, behind all options")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the export; the exit code is 2 for wrong arguments or files."""
    args = parse_args(argv)
    try:
        # The masks of a model that reads masks itself would be those that it reads.
        cfg = load_config(args.config_file, [*args.opts, "MODEL.OVSEG.PROPOSALS.FILES", ""])
        cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE)
        names = args.datasets or [*dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))]
        for name in names:
            require_registered(name)
        if args.from_annotations:
            header = {"annotations": args.from_annotations}
            source_of = partial(of_annotations, args.from_annotations)
        else:
            model = build_model(cfg).eval()
            if getattr(model, "proposals", None) is None:
                raise ValueError(f"{args.config_file}: {cfg.MODEL.META_ARCHITECTURE} has no mask generator")
            load_parts(model, cfg, strict=True)
            header = {"config_file": str(args.config_file), "fingerprint": model_fingerprint(cfg, model)}
            source_of = partial(of_model, cfg, model)
        scores = {}
        for name in names:
            path = proposal_path(args.output, name)
            export(source_of(name), name, path, header)
            found = None if args.no_recall else recall(name, path)
            if found is not None:
                scores[name] = {"mask recall": found}
                write_json(path.with_suffix(".recall.json"), {"dataset": name, **header, **found})
            print(path)
        if scores:
            print(results_table(scores))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
