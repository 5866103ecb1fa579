#!/usr/bin/env python
"""How FGA-seg's fast path changes what a trained model says: pixels whose class stays, classes that survive, time.

    python tools/top_k_agreement.py --config-file configs/ovshapes/fga_seg.yaml --images 50 \\
        MODEL.OVSEG.FGA_SEG.FAST True MODEL.WEIGHTS output/tables/fga_seg/fga_seg_fast/seed1/model_final.pth

The first images of the first dataset of DATASETS.TEST, each with every TOP_K of --top-k and without any (FGA-seg,
arXiv 2501.00877, Table VI). Times are medians, of this machine as it is.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tqdm import tqdm

import ovseg_d2.data
import ovseg_d2.modeling  # noqa: F401  (registers the models)
from ovseg_d2.data import build_test_loader
from ovseg_d2.engine.load_config import load_config
from ovseg_d2.engine.loading import load_model
from ovseg_d2.engine.setup import available_device
from ovseg_d2.modeling.meta_arch.fga_seg import FGASeg


@torch.no_grad()
def compare(model: FGASeg, batches: Iterable[list[dict[str, Any]]], top_ks: Sequence[int]) -> list[dict[str, float]]:
    """For every k, 0 (all classes) among them: ``agreement`` with 0 in percent of pixels, ``survivors``, ``ms``.

    Args:
        model: in evaluation mode, with auxiliary heads.
        batches: of one image.
    """
    head = model.cost_head
    survivors: list[float] = []
    hook = head.register_forward_hook(
        lambda _head, _args, maps: survivors.append(maps.kept.sum(dim=1).float().mean().item())
    )
    rows: list[dict[str, list[float]]] = [{"agreement": [], "survivors": [], "ms": []} for _ in top_ks]
    for batch in tqdm(batches, desc="images"):
        classes = {}
        for k, row in zip(top_ks, rows, strict=True):
            head.top_k = k
            survivors.clear()
            start = time.perf_counter()
            (result,) = model(batch)
            classes[k] = result["sem_seg"].argmax(dim=0).cpu()
            row["ms"].append(1e3 * (time.perf_counter() - start))
            row["survivors"].append(statistics.mean(survivors))
        for k, row in zip(top_ks, rows, strict=True):
            row["agreement"].append(100 * (classes[k] == classes[0]).float().mean().item())
    hook.remove()
    means = {"agreement": statistics.mean, "survivors": statistics.mean, "ms": statistics.median}
    return [{name: mean(row[name]) for name, mean in means.items()} for row in rows]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of an FGA-seg model")
    parser.add_argument(
        "--top-k", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="compared with all classes (1 4 8 16 32)"
    )
    parser.add_argument("--images", type=int, default=50, help="how many (%(default)s)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to change")
    args = parser.parse_args(argv)
    try:
        if min(args.top_k) < 1 or args.images < 1:
            raise ValueError(f"--top-k {min(args.top_k)}, --images {args.images}: expected 1 or more")
        cfg = load_config(args.config_file, args.opts)
        cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE)
        if cfg.MODEL.META_ARCHITECTURE != "FGASeg" or not cfg.MODEL.OVSEG.FGA_SEG.FAST:
            raise ValueError(
                f"{args.config_file}: expected MODEL.META_ARCHITECTURE FGASeg, MODEL.OVSEG.FGA_SEG.FAST True"
            )
        model = load_model(cfg)
        batches = itertools.islice(build_test_loader(cfg, cfg.DATASETS.TEST[0]), args.images)
        top_ks = [*args.top_k, 0]
        rows = compare(model, batches, top_ks)
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"top_k_agreement: {error}\n")
        return 1
    sys.stdout.write("| k | pixels that agree, % | classes that survive | ms an image |\n|---:|---:|---:|---:|\n")
    for k, row in zip(top_ks, rows, strict=True):
        cells = f"{row['agreement']:.2f} | {row['survivors']:.1f} | {row['ms']:.0f}"
        sys.stdout.write(f"| {k or 'all'} | {cells} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
