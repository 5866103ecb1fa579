#!/usr/bin/env python
"""Public checkpoints to this project's names, and back.

    python tools/convert_checkpoint.py fcclip_cocopan.pth fcclip.safetensors
    python tools/convert_checkpoint.py model_final_f07440.pkl swinl.safetensors --allow-pickle \\
        --config-file configs/mask2former/coco_panoptic_SwinL_IN21k.yaml
    python tools/convert_checkpoint.py ovseg://cat_seg_coco_stuff_ViTB16 cat_seg.safetensors
    python tools/convert_checkpoint.py output/fcclip/model_final.pth official.pth --inverse --like fcclip_cocopan.pth
    python tools/convert_checkpoint.py --list

The format is told by the content. MODEL.WEIGHTS takes public files as they are, too: a converted one is read without
pickle, and what of it is not used is listed here by name. With --config-file it must fit the model of that config.

--inverse names a checkpoint of this project as a public file of the same architecture does (--like), from which comes
what is not kept here: weights of the loss, tables that are computed, signals of prompts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import ovseg_d2  # noqa: F401  (first: it hides a warning of detectron2's import)

# isort: split
import torch
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import Tensor

import ovseg_d2.data
import ovseg_d2.modeling  # noqa: F401  (registers the models)
from ovseg_d2.checkpoint.catalogue import PREFIX, catalogue
from ovseg_d2.checkpoint.convert import convert_checkpoint, is_own, unknown_format
from ovseg_d2.checkpoint.invert import invert_state_dict
from ovseg_d2.checkpoint.io import read_state_dict, save_atomic
from ovseg_d2.checkpoint.matching import Match, describe_groups, match_state_dict
from ovseg_d2.engine.load_config import load_config
from ovseg_d2.modeling.clip.openai import is_torchscript
from ovseg_d2.modeling.clip.state_dict import fitted_weights


def read(path: str, *, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of a file, or of a checkpoint of the catalogue.

    Raises:
        ValueError: it cannot be read, or is OpenAI's archive of a CLIP.
        FileNotFoundError: it is not there.
    """
    local = Path(PathManager.get_local_path(path))
    if local.is_file() and is_torchscript(local):
        raise ValueError(f"{path} is a TorchScript archive, as OpenAI's CLIPs are; CLIP.PRETRAINED takes it as it is")
    return read_state_dict(local, allow_pickle=allow_pickle)


def convert(state_dict: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors in our names, and lines that say what was done.

    Raises:
        ValueError: the format is unknown.
    """
    conversion = convert_checkpoint(state_dict)
    if conversion.key_map is None:
        if not is_own(state_dict):
            raise ValueError(unknown_format(state_dict, source))
        return conversion.weights, [f"{source}: this project's own names, {len(state_dict)} tensors"]
    lines = [f"{source}: {conversion.key_map.name}, {len(state_dict)} tensors, {len(conversion.weights)} converted"]
    lines += listed("without counterpart, not used", conversion.dropped, state_dict)
    lines += listed("not of this format, kept under their names", conversion.untouched, state_dict)
    return conversion.weights, lines


def listed(title: str, names: Iterable[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """A heading with the number of tensors, and a line each."""
    lines = [f"  {name} {tuple(tensors[name].shape)}" for name in names]
    return [f"{title}: {len(lines)}", *lines] if lines else []


def match_config(weights: Mapping[str, Tensor], config_file: str) -> Match:
    """What of the tensors is for which tensor of a config's model, which is built without memory.

    Raises:
        ValueError: a tensor has no place in the model, or another shape.
    """
    cfg = load_config(config_file, ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    match = match_state_dict(model, fitted_weights(weights, model.state_dict()), source="the file")
    if match.unexpected or match.mismatched:
        shapes = [f"{m.name} is {m.file_shape} in the file, {m.model_shape} in the model" for m in match.mismatched[:3]]
        surplus = [f"not in the model: {describe_groups(match.unexpected)}"] if match.unexpected else []
        raise ValueError(f"the file does not fit the model of {config_file}: {'; '.join([*shapes, *surplus])}")
    return match


def catalogue_table() -> str:
    """A line a checkpoint that ``ovseg://`` knows."""
    lines = []
    for entry in catalogue().values():
        state = "at hand" if entry.converted.is_file() or entry.original.is_file() else entry.url or entry.page
        lines.append(f"{PREFIX}{entry.name:<42}{entry.format:<28}{entry.licence or 'see the page':<14}{state}")
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", metavar="FROM", help="checkpoint, or ovseg://NAME")
    parser.add_argument("target", nargs="?", metavar="TO", type=Path, help=".safetensors, or .pth")
    parser.add_argument("--inverse", action="store_true", help="from this project's names to a public code's")
    parser.add_argument("--like", metavar="FILE", help="a public file of the same architecture, for --inverse")
    parser.add_argument("--allow-pickle", action="store_true", help="read .pkl files, of whose origin you are sure")
    parser.add_argument("--config-file", metavar="FILE", help="the converted file must fit the model of this config")
    parser.add_argument("--list", action="store_true", help="only list the catalogue")
    args = parser.parse_args(argv)
    if not args.list and args.target is None:
        parser.error("expected FROM and TO, or --list")
    if args.inverse != bool(args.like):
        parser.error("--inverse and --like belong together")
    return args


def main(argv: list[str] | None = None) -> int:
    """Convert; the exit code is 2 for wrong arguments or files."""
    args = parse_args(argv)
    if args.list:
        print(catalogue_table())
        return 0
    try:
        state_dict = read(args.source, allow_pickle=args.allow_pickle)
        if args.inverse:
            like = read(args.like, allow_pickle=args.allow_pickle)
            inversion = invert_state_dict(state_dict, like, source=args.like)
            weights = inversion.weights
            lines = [f"{args.source}: {len(state_dict)} tensors -> {inversion.layout}, {len(weights)} tensors"]
            lines += listed(f"copied from {args.like}", inversion.copied, like)
            lines += listed(f"no place in {inversion.layout}, not used", inversion.unused, state_dict)
        else:
            weights, lines = convert(state_dict, args.source)
            if args.config_file:
                match = match_config(weights, args.config_file)
                lines.append(f"{args.config_file}: {len(match.weights)} of {match.total} tensors of the model")
                if match.missing:
                    lines.append(f"not in the file: {describe_groups(match.missing)}")
        save_atomic(weights, args.target)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*lines, str(args.target)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
