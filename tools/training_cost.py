"""Time and memory of a configuration's training step, with random weights and random targets.

    python tools/training_cost.py --batch 1 2 --config-file configs/maskclippp/coco_panoptic_ConvNeXtB.yaml
    python tools/training_cost.py --config-file configs/maskclippp/coco_panoptic_ConvNeXtB_fcclip.yaml \\
        MODEL.OVSEG.MASKCLIPPP.PRIOR matched        # the same with a mask generator in every step
    python tools/training_cost.py --size 128 128 --masks 8 --config-file configs/ovshapes/maskclippp.yaml

A step is forward, backward and the optimizer's update, in autocast where the config has it. Every batch size runs in a
process of its own, whose peak beyond what the model with its optimizer takes at rest is the memory of the step. Figures
are of this machine as it is: compare those of one run. CPU time, of all threads, minds other work on the machine least.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import ovseg_d2  # noqa: F401  (first: it hides a warning of detectron2's import)

# isort: split
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances

import ovseg_d2.data
import ovseg_d2.modeling  # noqa: F401  (registers the models)
from ovseg_d2.engine.load_config import load_config
from ovseg_d2.engine.optimizer import build_gradient_clipper, build_optimizer
from ovseg_d2.engine.setup import available_device
from ovseg_d2.structures import Vocabulary

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is there, not that above

from tools.memory import in_own_process, peak, resident  # noqa: E402


def random_batch(count: int, size: tuple[int, int], num_masks: int, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """``count`` training inputs of random pixels with rectangles of random classes."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for index in range(count):
        masks = torch.zeros(num_masks, *size, dtype=torch.bool)
        for mask in masks:
            top, left = (int(torch.randint(0, n // 2, (), generator=generator)) for n in size)
            mask[top : top + size[0] // 4, left : left + size[1] // 4] = True
        instances = Instances(size)
        instances.gt_classes = torch.randint(0, len(vocabulary), (num_masks,), generator=generator)
        instances.gt_masks = BitMasks(masks)
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "image_id": index, "instances": instances, "vocabulary": vocabulary})
    return batch


def measure(
    config_file: str, opts: list[str], *, batch: int, size: tuple[int, int], num_masks: int, repeats: int
) -> dict[str, float]:
    """``params`` and ``trainable`` in millions; of a step ``seconds``, ``cpu_seconds`` (medians) and ``mebibytes``."""
    cfg = load_config(config_file, opts)
    cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    vocabulary = model.vocabulary
    if vocabulary is None:
        vocabulary = Vocabulary(names=tuple(f"class {i}" for i in range(10)), is_thing=(True,) * 10)
    optimizer, clip = build_optimizer(cfg, model), build_gradient_clipper(cfg)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:  # so that the optimizer's state counts as being at rest
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    inputs = random_batch(batch, size, num_masks, vocabulary)
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    at_rest = torch.cuda.memory_allocated(device) / 2**20 if on_gpu else resident("VmRSS")
    seconds, cpu_seconds = [], []
    for _ in range(1 + repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        with torch.autocast(device.type, getattr(torch, cfg.SOLVER.AMP.DTYPE), enabled=cfg.SOLVER.AMP.ENABLED):
            loss = sum(model(inputs).values())
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            clip(parameters)
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "params": sum(p.numel() for p in model.parameters()) / 1e6,
        "trainable": sum(p.numel() for p in parameters) / 1e6,
        "seconds": statistics.median(seconds[1:] or seconds),
        "cpu_seconds": statistics.median(cpu_seconds[1:] or cpu_seconds),
        "mebibytes": peak(device) - at_rest,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of the model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="images a step (1)")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the images (default: INPUT.IMAGE_SIZE)"
    )
    parser.add_argument("--masks", type=int, default=12, help="targets an image (%(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=2, help="steps that count, after one that does not (%(default)s); 0: that one"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to change")
    args = parser.parse_args(argv)
    try:
        cfg = load_config(args.config_file, args.opts)
        size = tuple(args.size or (cfg.INPUT.IMAGE_SIZE,) * 2)
        for batch in args.batch:
            options = {"batch": batch, "size": size, "num_masks": args.masks, "repeats": args.repeats}
            found = in_own_process(partial(measure, args.config_file, args.opts, **options))
            sys.stdout.write(
                f"batch {batch} of {size[0]} x {size[1]}: {found['seconds']:.1f} s a step "
                f"({found['cpu_seconds']:.1f} s of CPU), {found['mebibytes']:.0f} MiB beyond the model at rest; "
                f"{found['trainable']:.1f} M of {found['params']:.1f} M parameters train\n"
            )
            sys.stdout.flush()
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"training_cost: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
