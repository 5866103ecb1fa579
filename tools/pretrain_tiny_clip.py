#!/usr/bin/env python
"""Pre-train a tiny CLIP on image-caption pairs of OVShapes (all 72 classes, no masks).

    python tools/pretrain_tiny_clip.py --name OVShapes-RN  --output output/tiny_clip_rn
    python tools/pretrain_tiny_clip.py --name OVShapes-ViT --output output/tiny_clip_vit \\
        --teacher ovseg_d2/model_zoo/OVShapes-RN.safetensors --export ovseg_d2/model_zoo/OVShapes-ViT.safetensors

Runs on CUDA if there is one. A run that was interrupted goes on where it stopped when it is started again with the same
--output. The pictures are drawn once into --pool (about ten minutes on one core) and used several times, each time
scaled, moved and mirrored anew. --export writes the weights in half precision, as they ship.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is there, not that above

from tools.tiny_clip.data import CaptionSampler, augment, load_pool, zero_shot_pictures  # noqa: E402
from tools.tiny_clip.model import (  # noqa: E402
    ZOO,
    build,
    encode_image,
    encode_text,
    export,
    image_size,
    load_weights,
    start_well,
    zero_shot,
)
from tools.tiny_clip.optimizer import build_optimizers  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)

    model, tokenizer = build(args.name)
    size = image_size(args.name)
    pool_size = size + size // 8
    large = load_pool(args.pool, "large", args.large_images, pool_size, args.workers)
    mixed = load_pool(args.pool, "mixed", args.images, pool_size, args.workers)
    start_well(model.visual)
    teacher = None
    if args.teacher:
        teacher, _ = build(args.teacher.stem)
        load_weights(teacher, args.teacher)
        teacher.to(device).eval().requires_grad_(False)
    model.to(device)

    optimizers = build_optimizers(model, lr=args.lr, weight_decay=args.weight_decay)
    state_file = args.output / "state.pth"
    step = 0
    if state_file.exists():
        step = load_state(state_file, model, optimizers, device)
    elif args.start:
        load_weights(model, args.start)

    test_images, test_labels = zero_shot_pictures(args.test_images, size, device)
    captions = CaptionSampler(tokenizer, device)
    log = open(args.output / "log.jsonl", "a", encoding="utf-8")
    bar = tqdm(total=args.steps, initial=step, desc=args.name, mininterval=20)
    start_time, running = time.monotonic(), []
    while step < args.steps:
        # A generator of its own for every step: a resumed run draws what an uninterrupted one draws.
        rng = np.random.default_rng([args.seed, step])
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, args)
        images, labels = large if step < args.large_steps else mixed
        indices = rng.integers(0, len(images), args.batch)
        batch = augment(torch.from_numpy(images[indices]).to(device), size, seed=int(rng.integers(2**31)))
        tokens, targets = captions(labels[indices], rng)
        model.train()
        loss = caption_loss(model, teacher, batch, tokens, targets, args)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        running.append(loss.detach())
        step += 1
        bar.update()
        if step % args.eval_period == 0 or step == args.steps:
            record = {
                "step": step,
                "images": step * args.batch,
                "loss": round(float(torch.stack(running).mean()), 4),
                "seconds": round(time.monotonic() - start_time),
                **zero_shot(model, tokenizer, test_images, test_labels),
            }
            running = []
            log.write(json.dumps(record) + "\n")
            log.flush()
            bar.set_postfix(loss=record["loss"], top1=record["top1"])
            save_state(state_file, model, optimizers, step)
    if args.export:
        export(model, args.export, {"images": step * args.batch, "name": args.name})


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Warm-up times half a cosine, never below a two-hundredth."""
    scale = min(1, (step + 1) / args.warmup) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    return args.lr * max(scale, 0.005)


def caption_loss(
    model: nn.Module,
    teacher: nn.Module | None,
    images: Tensor,
    tokens: Tensor,
    targets: Tensor,
    args: argparse.Namespace,
) -> Tensor:
    """Pictures (B, 3, H, W) name their captions among texts (T, 77), and do so as the teacher does."""
    logits = model.logit_scale.exp().clamp(max=100) * encode_image(model, images) @ encode_text(model, tokens).T
    loss = F.cross_entropy(logits, targets, label_smoothing=args.label_smoothing)
    if teacher is None:
        return loss
    with torch.no_grad():
        taught = teacher.logit_scale.exp() * encode_image(teacher, images) @ encode_text(teacher, tokens).T
        taught = (taught / args.temperature).softmax(-1)
    soft = F.cross_entropy(logits / args.temperature, taught) * args.temperature**2
    return (1 - args.distill) * loss + args.distill * soft


def load_state(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], device: torch.device) -> int:
    """Go on from what :func:`save_state` wrote; the steps that are done."""
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    return state["step"]


def save_state(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    temporary = path.with_suffix(".tmp")
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"model": model.state_dict(), "optimizers": states, "step": step}, temporary)
    os.replace(temporary, path)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, choices=sorted(path.stem for path in ZOO.glob("*.json")))
    parser.add_argument("--output", type=Path, required=True, help="folder of the training state and the log")
    parser.add_argument("--pool", type=Path, default=Path("output/caption_pool"), help="folder of the drawn pictures")
    parser.add_argument("--images", type=int, default=40000, help="pictures in the pool; default %(default)s")
    parser.add_argument(
        "--large-images", type=int, default=12000, help="easy pictures in the pool; default %(default)s"
    )
    parser.add_argument(
        "--large-steps", type=int, default=400, help="steps on easy pictures first; default %(default)s"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw the pool")
    parser.add_argument("--steps", type=int, default=2000, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument(
        "--teacher", type=Path, help="weights of another tiny CLIP to distil from (named after its model)"
    )
    parser.add_argument("--distill", type=float, default=0.5, help="weight of the teacher's part of the loss")
    parser.add_argument(
        "--temperature", type=float, default=2.0, help="of the teacher's and the student's distribution"
    )
    parser.add_argument("--start", type=Path, help="weights to start from, with a fresh optimizer: to train longer")
    parser.add_argument("--export", type=Path, help="safetensors file to write at the end")
    parser.add_argument("--eval-period", type=int, default=100, help="steps between tests and saved states")
    parser.add_argument("--test-images", type=int, default=320)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
