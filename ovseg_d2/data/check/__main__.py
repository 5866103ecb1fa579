"""Check datasets on disk: folders, annotation files, numbers of images, sizes and values of all label files.

Datasets lie below $DETECTRON2_DATASETS (default: datasets); datasets/README.md shows what each looks like.

examples:
  python -m ovseg_d2.data.check                                 which datasets are there
  python -m ovseg_d2.data.check ade20k_panoptic_val voc_sem_seg_val
  python -m ovseg_d2.data.check coco_2017_train_panoptic_with_sem_seg --quick    without opening label files
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ovseg_d2.data.check.before_run import require_registered
from ovseg_d2.data.check.on_disk import check_on_disk, missing_places, project_datasets
from ovseg_d2.data.datasets import dataset_root
from ovseg_d2.data.datasets.conversion import run_jobs, run_script
from ovseg_d2.data.label_files import Runner


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ovseg_d2.data.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="registered datasets; none: list all")
    parser.add_argument("--quick", action="store_true", help="do not open label files")
    parser.add_argument("--partial", action="store_true", help="a part of the public images is enough")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="processes (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """0 if all is well, 1 if not."""
    args = get_parser().parse_args(argv)
    if not args.names:
        return _list()
    for name in args.names:
        require_registered(name)
    run = None if args.quick else functools.partial(_run, workers=args.workers)
    return max(_report(name, run=run, partial=args.partial) for name in args.names)


def _run(job: Callable[[Any], Any], items: Sequence[Any], *, workers: int) -> list[Any]:
    return run_jobs(job, items, workers=workers, description="label files")


def _list() -> int:
    _write(f"datasets below {os.path.abspath(dataset_root())}")
    for name in project_datasets():
        missing = missing_places(name)
        _write(f"  {'there' if not missing else 'lacks ' + missing[0]:<60} {name}")
    return 0


def _report(name: str, *, run: Runner | None, partial: bool) -> int:
    findings = check_on_disk(name, run=run, partial=partial)
    problems = 0
    _write(name)
    for finding in findings:
        problems += finding.is_problem
        _write(f"  {'PROBLEM' if finding.is_problem else 'ok':<8} {finding.what:<21} {finding.text}")
    return int(problems > 0)


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    run_script(main)
