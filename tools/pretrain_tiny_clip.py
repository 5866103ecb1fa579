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
import multiprocessing
import os
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ovseg_d2.data.datasets.ovshapes import CLASS_NAMES
from ovseg_d2.data.datasets.ovshapes_captions import (
    CAPTION_TEMPLATES,
    caption_text,
    captioned_image,
    large_thing_image,
    zero_shot_image,
)
from ovseg_d2.data.datasets.ovshapes_scene import NUM_THINGS

ZOO = Path(__file__).resolve().parents[1] / "ovseg_d2" / "model_zoo"
MAX_NAMES = 3  # classes that one caption names at most


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)

    model, tokenizer = build(args.name)
    size = json.loads((ZOO / f"{args.name}.json").read_text())["vision_cfg"]["image_size"]
    pool_size = size + size // 8
    large = load_pool(args.pool, "large", args.large_images, pool_size, args.workers)
    mixed = load_pool(args.pool, "mixed", args.images, pool_size, args.workers)
    if isinstance(model.visual, open_clip.transformer.VisionTransformer):
        mimetic_init(model.visual)
    else:
        whole_residuals(model.visual)
    teacher = None
    if args.teacher:
        teacher, _ = build(args.teacher.stem)
        teacher.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in load_file(args.teacher).items()}
        )
        teacher.to(device).eval().requires_grad_(False)
    model.to(device)

    optimizers = build_optimizers(model, lr=args.lr, weight_decay=args.weight_decay)
    state_file = args.output / "state.pth"
    step = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        step = state["step"]
    elif args.start:
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(args.start).items()})

    test = [zero_shot_image(i, size) for i in range(args.test_images)]
    test_images = torch.from_numpy(np.stack([x.image for x in test])).to(device)
    test_labels = torch.tensor([x.class_ids[0] for x in test], device=device)
    captions = CaptionSampler(tokenizer, device)
    log = open(args.output / "log.jsonl", "a", encoding="utf-8")
    bar = tqdm(total=args.steps, initial=step, desc=args.name, mininterval=20)
    start_time, running = time.monotonic(), []
    while step < args.steps:
        # A generator of its own for every step: a resumed run draws what an uninterrupted one draws.
        rng = np.random.default_rng([args.seed, step])
        scale = min(1, (step + 1) / args.warmup) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = args.lr * max(scale, 0.005)
        images, labels = large if step < args.large_steps else mixed
        indices = rng.integers(0, len(images), args.batch)
        batch = augment(torch.from_numpy(images[indices]).to(device), size, seed=int(rng.integers(2**31)))
        tokens, targets = captions(labels[indices], rng)
        model.train()
        logits = model.logit_scale.exp().clamp(max=100) * encode_image(model, batch) @ encode_text(model, tokens).T
        loss = F.cross_entropy(logits, targets, label_smoothing=args.label_smoothing)
        if teacher is not None:
            with torch.no_grad():
                taught = teacher.logit_scale.exp() * encode_image(teacher, batch) @ encode_text(teacher, tokens).T
                taught = (taught / args.temperature).softmax(-1)
            soft = F.cross_entropy(logits / args.temperature, taught) * args.temperature**2
            loss = (1 - args.distill) * loss + args.distill * soft
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
            temporary = state_file.with_suffix(".tmp")
            states = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"model": model.state_dict(), "optimizers": states, "step": step}, temporary)
            os.replace(temporary, state_file)
    if args.export:
        export(model, args.export, {"images": step * args.batch, "name": args.name})


def parse_args() -> argparse.Namespace:
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
    return parser.parse_args()


def build(name: str) -> tuple[nn.Module, open_clip.SimpleTokenizer]:
    """The architecture ``name`` of the zoo with random weights, and its tokenizer."""
    tokenizer = open_clip.SimpleTokenizer(bpe_path=str(ZOO / "ovshapes_bpe.txt.gz"))
    config = json.loads((ZOO / f"{name}.json").read_text())
    config["text_cfg"]["vocab_size"] = tokenizer.vocab_size
    return open_clip.CLIP(**config), tokenizer


def mimetic_init(visual: nn.Module) -> None:
    """Start attention near "look at what is alike" and positions as sines (mimetic initialization, arXiv 2305.09828).

    A ViT of this size learns several times faster from few pictures than from the usual random weights.
    """
    for block in visual.transformer.resblocks:
        attention = block.attn
        dim, heads = attention.embed_dim, attention.num_heads
        head_dim = dim // heads
        noise = torch.randn(heads, dim, dim) / math.sqrt(dim)
        u, s, v = torch.linalg.svd(0.7 * noise + 0.7 * torch.eye(dim))
        root = s[:, :head_dim].sqrt()
        query = (u[:, :, :head_dim] * root[:, None]).transpose(1, 2).reshape(dim, dim)
        key = v[:, :head_dim] * root[..., None]
        u, s, v = torch.linalg.svd(0.4 * torch.randn(dim, dim) / math.sqrt(dim) - 0.4 * torch.eye(dim))
        with torch.no_grad():
            attention.in_proj_weight.copy_(torch.cat([query, key.reshape(dim, dim), s.sqrt()[:, None] * v]))
            attention.out_proj.weight.copy_(u * s.sqrt())
    grid, dim = int(math.isqrt(len(visual.positional_embedding) - 1)), visual.positional_embedding.shape[1]
    frequency = 1 / 10000 ** (torch.arange(dim // 4) / (dim // 4))
    angle = torch.arange(grid)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    table = torch.cat([axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)], dim=-1).reshape(-1, dim)
    with torch.no_grad():
        visual.positional_embedding[1:] = 0.3 * table


def whole_residuals(visual: nn.Module) -> None:
    """Let the residual branches of a ResNet count from the start; open_clip begins with their last scale at zero."""
    for name, parameter in visual.named_parameters():
        if name.startswith("layer") and name.endswith("bn3.weight"):
            nn.init.ones_(parameter)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    As torch.optim.Muon, for the kernels of convolutions too, and in float32: half precision is slow on most CPUs.
    """

    def __init__(self, params: list[Tensor], *, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalised(parameter.grad.lerp(average, group["momentum"]).flatten(1))
                # This factor gives updates of the size that AdamW's have, so that both share one learning rate.
                size = group["lr"] * 0.2 * max(update.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update.reshape(parameter.shape), alpha=size)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Matrix (A, B) with its singular values moved to about 1: five Newton-Schulz steps with Muon's coefficients."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def build_optimizers(model: nn.Module, *, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner matrices and kernels, AdamW for embeddings, the attention pool (large) and vectors."""
    inner, outer, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif "resblocks" in name or name.startswith("visual.layer"):
            inner.append(parameter)
        else:
            outer.append(parameter)
    groups = [{"params": outer, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [Muon(inner, lr=lr, weight_decay=weight_decay), torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))]


def _draw(index: int, kind: str, size: int) -> tuple[np.ndarray, list[int]]:
    example = (large_thing_image if kind == "large" else captioned_image)(index, size)
    return example.image, [*example.class_ids, *[-1] * MAX_NAMES][:MAX_NAMES]


def load_pool(folder: Path, kind: str, count: int, size: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (count, size, size, 3) uint8 and class ids (count, MAX_NAMES) int64 or -1; drawn if not on disk.

    Args:
        kind: "large" (one large thing each) or "mixed".
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{kind}_{part}_{size}_{count}.npy" for part in ("images", "labels")]
    if not all(file.exists() for file in files):
        images = np.zeros((count, size, size, 3), np.uint8)
        labels = np.full((count, MAX_NAMES), -1, np.int64)
        draw = partial(_draw, kind=kind, size=size)
        with multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else nullcontext() as pool:
            drawn = pool.imap(draw, range(count), chunksize=64) if pool else map(draw, range(count))
            for i, (image, classes) in enumerate(tqdm(drawn, total=count, desc=f"drawing ({kind})", mininterval=10)):
                images[i], labels[i] = image, classes
        for file, array in zip(files, (images, labels), strict=True):
            np.save(file.with_suffix(".part.npy"), array)
            os.replace(file.with_suffix(".part.npy"), file)
    return np.load(files[0], mmap_mode="r"), np.load(files[1])


def augment(images: Tensor, size: int, *, seed: int) -> Tensor:
    """Scale, move and mirror pictures (B, S, S, 3) uint8 -> (B, 3, size, size) float in [0, 255]."""
    generator = torch.Generator().manual_seed(seed)
    n, full = images.shape[0], images.shape[1]
    scale = torch.empty(n).uniform_(0.8, 1.1, generator=generator) * size / full
    flip = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    room = (1 - scale).clamp(min=0)[:, None]
    shift = (2 * torch.rand(n, 2, generator=generator) - 1) * room
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * flip, scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False).to(images.device)
    pixels = images.permute(0, 3, 1, 2).float()
    return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


def encode_image(model: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 255] -> unit embeddings (B, D)."""
    mean, std = (
        images.new_tensor(x).view(3, 1, 1) for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    return F.normalize(model.encode_image((images / 255 - mean) / std), dim=-1)


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """(T, 77) -> unit embeddings (T, D); nothing is computed behind the longest text, which the causal mask hides."""
    ends = tokens.argmax(-1)
    length = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return F.normalize(x[torch.arange(len(x), device=x.device), ends] @ model.text_projection, dim=-1)


class CaptionSampler:
    """Captions of a batch: all 72 names, each in a random template, and the sentences that name several classes.

    Every picture is contrasted with all names, not only with those of its batch: with 72 of them, a batch's own
    captions would mostly repeat.
    """

    def __init__(self, tokenizer: open_clip.SimpleTokenizer, device: torch.device) -> None:
        self.tokenizer = tokenizer
        self.device = device
        self.cache: dict[str, Tensor] = {}

    def __call__(self, labels: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """labels (B, MAX_NAMES) -> tokens (T, 77), targets (B,) in [0, T)."""
        sets: dict[tuple[int, ...], int] = {(i,): i for i in range(len(CLASS_NAMES))}
        targets = [sets.setdefault(tuple(int(i) for i in row if i >= 0), len(sets)) for row in labels]
        templates = rng.integers(0, len(CAPTION_TEMPLATES), len(sets))
        texts = [caption_text(ids, CAPTION_TEMPLATES[t]) for ids, t in zip(sets, templates, strict=True)]
        missing = [text for text in texts if text not in self.cache]
        if missing:
            self.cache.update(zip(missing, self.tokenizer(missing), strict=True))
        tokens = torch.stack([self.cache[text] for text in texts])
        return tokens.to(self.device), torch.tensor(targets, device=self.device)


@torch.no_grad()
def zero_shot(
    model: nn.Module, tokenizer: open_clip.SimpleTokenizer, images: Tensor, labels: Tensor
) -> dict[str, float]:
    """Top-1 (percent) over the 64 thing names with one template; of the colour and of the shape alone too."""
    model.eval()
    texts = tokenizer([f"a photo of a {name}." for name in CLASS_NAMES[:NUM_THINGS]]).to(images.device)
    embeds = torch.cat([encode_image(model, chunk.permute(0, 3, 1, 2).float()) for chunk in images.split(64)])
    guess = (embeds @ encode_text(model, texts).T).argmax(-1)
    return {
        "top1": round(100 * float((guess == labels).float().mean()), 1),
        "color": round(100 * float((guess // 8 == labels // 8).float().mean()), 1),
        "shape": round(100 * float((guess % 8 == labels % 8).float().mean()), 1),
    }


def export(model: nn.Module, path: Path, metadata: dict[str, object]) -> None:
    """Half-precision weights (batch-norm counters left out of the conversion) with a line of metadata."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, path, {k: str(v) for k, v in metadata.items()})
    path.chmod(0o644)  # safetensors makes files that only their owner can read


if __name__ == "__main__":
    main()
