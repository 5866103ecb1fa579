#!/usr/bin/env python
"""Time parts of the project on this machine.

    python tools/benchmark.py                      # every topic below
    python tools/benchmark.py --only deformable
    python tools/benchmark.py --only fgaseg --only lcsa --repeats 1 --threads 1

Weights are random, float32 where nothing else is said, batch 1. Figures are the minimum and the median of --repeats
runs after one warm-up; compared forms take turns, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is there, not that above

from tools.benchmarks import deformable, fga_seg, lcsa, maft, mask2former, mta_clip, text  # noqa: E402
from tools.benchmarks.timing import Timings  # noqa: E402


@dataclass(frozen=True)
class Topic:
    """``minutes``: about how long, with the default --repeats on one thread of a CPU."""

    run: Callable[..., Timings]
    minutes: int
    what: str


TOPICS = {
    "deformable": Topic(deformable.run, 1, "the deformable core against its plain form"),
    "mask2former": Topic(mask2former.run, 1, "forward of Mask2Former R50 at 512 x 512, split by part"),
    "text": Topic(text.run, 5, "a vocabulary of 847 names through the text tower of ViT-B-16"),
    "maft": Topic(maft.run, 6, "100 proposals: IP-CLIP against crops, and the memory of masks"),
    "mta_clip": Topic(mta_clip.run, 7, "training steps of MTA-CLIP RN50 beside Mask2Former's, at 512 x 512"),
    "fgaseg": Topic(fga_seg.run, 5, "FGA-seg's cost volume: time and memory against classes and top-k"),
    "lcsa": Topic(lcsa.run, 2, "LDVC's local-consensus attention against attention of all pixels"),
}


def topics() -> str:
    """A line a topic, for --help."""
    lines = [f"  {name:<13}{topic.what:<72}{topic.minutes:>3} min" for name, topic in TOPICS.items()]
    return "\n".join(["topics, and about how long each takes on one thread of a CPU:", *lines])


def report(name: str, timings: Timings) -> None:
    print(f"\n{name}\n{'part':<34}{'min ms':>10}{'median ms':>12}")
    for part, values in timings.items():
        print(f"{part:<34}{min(values):>10.1f}{statistics.median(values):>12.1f}")
    for part, values in timings.items():
        plain = timings.get(part.replace("core,", "core, plain form,"))
        if plain and plain is not values:
            ratio = statistics.median(plain) / statistics.median(values)
            print(f"{part}: {ratio:.2f} times as fast as the plain form (medians)")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=topics(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=sorted(TOPICS), action="append", help="this topic; can be repeated")
    parser.add_argument("--repeats", type=int, default=7, help="counted runs (default 7)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="also write all timings to this JSON file")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} CPU threads, {args.repeats} repeats")
    results = {}
    for name in args.only or TOPICS:
        results[name] = TOPICS[name].run(repeats=args.repeats, device=device)
        report(name, results[name])
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
