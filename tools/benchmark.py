"""Time parts of the project on this machine.

    python tools/benchmark.py                      # everything below
    python tools/benchmark.py --only deformable    # the deformable core against its plain form
    python tools/benchmark.py --only mask2former   # forward of Mask2Former R50 at 512 x 512, split by part
    python tools/benchmark.py --only text          # a vocabulary of 847 names through the text tower of ViT-B-16
    python tools/benchmark.py --only maft          # 100 proposals: IP-CLIP against crops, and the memory of masks
    python tools/benchmark.py --only mta_clip      # training steps of MTA-CLIP RN50 beside Mask2Former's, at 512 x 512
    python tools/benchmark.py --only fgaseg        # FGA-seg's cost volume: time and memory against classes and top-k
    python tools/benchmark.py --only lcsa          # LDVC's local-consensus attention against attention of all pixels

Weights are random, float32 where nothing else is said, batch 1. Figures are the minimum and the median of --repeats
runs after one warm-up; compared forms take turns, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import ovseg_d2.modeling  # noqa: F401  (registers the models)
from ovseg_d2.config import add_ovseg_config
from ovseg_d2.data.templates import get_templates
from ovseg_d2.data.vocabulary import vocabulary_from_metadata
from ovseg_d2.engine.load_config import load_config
from ovseg_d2.modeling.clip.build import build_clip, clip_tokenizer
from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD, ClipImageEncoder
from ovseg_d2.modeling.inference import mask_inference
from ovseg_d2.modeling.layers.ms_deform_attn import deformable_sampling, deformable_sampling_by_grid
from ovseg_d2.modeling.mask_classification.crops import CropEncoder
from ovseg_d2.modeling.mask_classification.mask_encoder import MaskEncoder
from ovseg_d2.modeling.pixel_classification.cost_head import CostHead
from ovseg_d2.modeling.pixel_classification.routing_attention import LocalConsensusAttention
from ovseg_d2.modeling.proposals.pixel_decoder import pixel_centres
from ovseg_d2.modeling.text_classifier import TextClassifier
from ovseg_d2.structures import ClipFeatures, ImageBatch, MaskProposals, TextClasses, Vocabulary

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is there, not that above

from tools.memory import begin_peak, peak  # noqa: E402

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CONFIG = CONFIGS / "mask2former" / "ade20k_semantic_R50.yaml"
Timings = dict[str, list[float]]


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def in_turns(functions: dict[str, Callable[[], object]], *, repeats: int, device: torch.device) -> Timings:
    """Milliseconds of every function, called in turns; the first round warms up and is not counted."""
    timings: Timings = defaultdict(list)
    for repeat in tqdm(range(repeats + 1), desc="/".join(functions), leave=False):
        for name, function in functions.items():
            start = clock(device)
            function()
            if repeat:
                timings[name].append(1e3 * (clock(device) - start))
    return timings


def deformable(*, repeats: int, device: torch.device) -> Timings:
    """The core at 512 x 512: levels of stride 32, 16 and 8, 8 heads of 32 channels, 4 points, offsets of 3 pixels."""
    torch.manual_seed(0)
    shapes = [(16, 16), (32, 32), (64, 64)]
    centres = pixel_centres(shapes, device)
    total, heads, dim, points = len(centres), 8, 32, 4
    sizes = torch.tensor([[w, h] for h, w in shapes], device=device)
    offsets = 3 * torch.randn(1, total, heads, len(shapes), points, 2, device=device) / sizes[:, None]
    locations = centres[None, :, None, None, None] + offsets
    weights = torch.rand(1, total, heads, len(shapes) * points, device=device).softmax(-1)
    weights = weights.view(1, total, heads, len(shapes), points)
    value = torch.randn(1, total, heads, dim, device=device)
    forms = {"core": deformable_sampling, "core, plain form": deformable_sampling_by_grid}

    def forward(form: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> None:
            with torch.inference_mode():
                form(value, shapes, locations, weights)

        return run

    def forward_backward(form: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> None:
            leaves = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
            form(leaves[0], shapes, *leaves[1:]).sum().backward()

        return run

    timings = in_turns({f"{k}, forward": forward(f) for k, f in forms.items()}, repeats=repeats, device=device)
    both = {f"{k}, forward + backward": forward_backward(f) for k, f in forms.items()}
    return timings | in_turns(both, repeats=repeats, device=device)


@contextmanager
def timed_modules(modules: dict[str, nn.Module], into: Timings, device: torch.device):
    """Record the milliseconds that each module's forward takes."""
    starts: dict[str, float] = {}
    handles = []
    for name, module in modules.items():

        def before(_module: nn.Module, _args: object, name: str = name) -> None:
            starts[name] = clock(device)

        def after(_module: nn.Module, _args: object, _output: object, name: str = name) -> None:
            into[name].append(1e3 * (clock(device) - starts[name]))

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    yield
    for handle in handles:
        handle.remove()


def mask2former(*, repeats: int, device: torch.device) -> Timings:
    """Mask2Former R50, 100 queries, 9 decoder layers, 150 classes, one 512 x 512 image to semantic scores."""
    torch.manual_seed(0)
    cfg = get_cfg()
    add_ovseg_config(cfg)
    cfg.merge_from_file(str(CONFIG))
    cfg.MODEL.DEVICE = str(device)
    cfg.DATASETS.TRAIN = ()
    model = build_model(cfg).eval()
    names = tuple(f"class {i}" for i in range(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES))
    vocabulary = Vocabulary(names=names, is_thing=(False,) * len(names))
    batch = [{"image": torch.randint(0, 256, (3, 512, 512)).float(), "vocabulary": vocabulary}]
    proposals = model.proposals
    modules = {
        "backbone": proposals.backbone,
        "pixel decoder": proposals.pixel_decoder,
        "mask decoder": proposals.mask_decoder,
    }
    timings: Timings = defaultdict(list)
    with torch.inference_mode():
        model(batch)
        with timed_modules(modules, timings, device):
            for _ in tqdm(range(repeats), desc="mask2former", leave=False):
                start = clock(device)
                model(batch)
                timings["total"].append(1e3 * (clock(device) - start))
        features = proposals(model.preprocess(batch))
        class_probs = features.class_logits[0].softmax(-1)
        mask_logits = F.interpolate(features.mask_logits, size=(512, 512), mode="bilinear")[0]
        semantic = {"semantic inference": lambda: mask_inference.semantic_inference(class_probs, mask_logits)}
        timings |= in_turns(semantic, repeats=repeats, device=device)
    return timings


def peak_memory(device: torch.device) -> float:
    """MiB, of the process or of what it holds on a GPU, since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def text(*, repeats: int, device: torch.device, names: int = 847, compared_names: int = 16) -> Timings:
    """Names in 14 templates, cut to the longest text of a chunk; in turns with all 77 tokens for a few names.

    The names are those of ADE20K's 150 classes, plain and with adjectives.
    """
    torch.manual_seed(0)
    clip = build_clip("ViT-B-16").to(device).eval().requires_grad_(False)
    encoder, tokenizer, templates = clip.text, clip_tokenizer("ViT-B-16"), get_templates(["vild"])
    classes = [name.split(",")[0].strip() for name in MetadataCatalog.get("ade20k_sem_seg_val").stuff_classes]
    known = dict.fromkeys(f"{word}{name}" for word in ("", "old ", "red ", "big ", "wet ", "toy ") for name in classes)
    all_names = tuple(known)[:names]
    chunk_size = 512

    def cut(count: int) -> torch.Tensor:
        classifier = TextClassifier(tokenizer=tokenizer, templates=templates, chunk_size=chunk_size)
        vocabulary = Vocabulary(names=all_names[:count], is_thing=(True,) * count)
        return classifier(encoder, vocabulary).embeds

    @torch.no_grad()
    def whole(count: int) -> torch.Tensor:
        tokens = tokenizer([template.format(name) for name in all_names[:count] for template in templates]).to(device)
        embeds = []
        for chunk in tokens.split(chunk_size):
            states = encoder.token_states(chunk)[torch.arange(len(chunk), device=device), chunk.argmax(dim=1)]
            embeds.append(F.normalize(states @ encoder.text_projection, dim=-1))
        return torch.cat(embeds).unflatten(0, (count, -1))

    few = min(compared_names, names)
    memory = [peak_memory(device)]
    encoder.weights_hash()  # taken once at load, so not part of the time
    start = clock(device)
    cut(names)
    seconds = clock(device) - start
    memory.append(peak_memory(device))
    difference = float((whole(few) - cut(few)).abs().max())
    memory.append(peak_memory(device))
    print(f"{names} names x {len(templates)} templates, cut: {seconds:.1f} s; {few} names with 77 tokens beside it")
    print(f"peak memory: {memory[0]:.0f} MiB before, {memory[1]:.0f} cut, {memory[2]:.0f} with 77 tokens")
    print(f"largest difference of the unit vectors: {difference:.1e}")
    forms = {f"core, {few} names": lambda: cut(few), f"core, plain form, {few} names": lambda: whole(few)}
    return in_turns(forms, repeats=repeats, device=device)


def ip_clip(device: torch.device) -> ClipImageEncoder:
    """ViT-B/16 with MAFT's mask tokens."""
    torch.manual_seed(0)
    options = {"mask_mode": "maft", "start_layer": 8, "last_block": "none"}
    return build_clip("ViT-B-16", visual_kwargs=options, with_text=False).visual.to(device).eval().requires_grad_(False)


def random_proposals(count: int, *, stride: int, device: torch.device) -> MaskProposals:
    """Rectangles of a sixteenth to three quarters of a 480 x 480 image, as logits on a map of a ``stride``."""
    size = 480 // stride
    sides = (torch.empty(count, 2).uniform_(0.25, 0.87) * size).long()
    starts = (torch.rand(count, 2) * (size - sides)).long()
    places = torch.arange(size)
    rows, columns = ((places >= starts[:, i, None]) & (places < (starts + sides)[:, i, None]) for i in (0, 1))
    masks = rows[:, :, None] & columns[:, None]
    return MaskProposals(mask_logits=torch.where(masks, 5.0, -5.0)[None].to(device))


def memory_of_masks(count: int, device_name: str, threads: int) -> float:
    """MiB at the peak of one forward of IP-CLIP with ``count`` masks of 480 x 480, beyond the weights.

    Everything else is new, the image and the masks too. For a process of its own, where nothing is held from before.
    """
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    encoder = ip_clip(device)
    before = begin_peak(device)
    with torch.inference_mode():
        proposals = random_proposals(count, stride=1, device=device)
        images = torch.randn(1, 3, 480, 480, device=device)
        encoder.encode_masks(encoder(images, masks_only=True), proposals.mask_logits, from_logits=True)
    return peak(device) - before


class NoClip:
    """Takes pictures as an image encoder does, and computes nothing."""

    embed_dim = 512

    def __call__(self, pictures: torch.Tensor) -> ClipFeatures:
        return ClipFeatures(image_embeds=pictures.new_zeros(len(pictures), self.embed_dim), dense=None, layers={})


def maft(*, repeats: int, device: torch.device, count: int = 100) -> Timings:
    """Proposals at stride 4 on one 480 x 480 image to embeddings: IP-CLIP in one pass, a crop of 224 x 224 each.

    Both as a model runs them, with the resizing of the masks. The difference to crops alone, without CLIP, is what
    CLIP takes for them.
    """
    for number in (25, 50, 100, 200):
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            mebibytes = pool.submit(memory_of_masks, number, str(device), torch.get_num_threads()).result()
        print(f"IP-CLIP, {number} masks: {mebibytes:.0f} MiB beyond the weights")
    visual = ip_clip(device)
    images = ImageBatch(tensor=torch.randn(1, 3, 480, 480, device=device), image_sizes=[(480, 480)], image_ids=[0])
    proposals = random_proposals(count, stride=4, device=device)
    normalised = {"pixel_mean": CLIP_PIXEL_MEAN, "pixel_std": CLIP_PIXEL_STD}
    one_pass = MaskEncoder(**normalised).to(device)
    crops = MaskEncoder(**normalised, crops=CropEncoder(style="mask_crop", size=224)).to(device)

    forms = {
        "IP-CLIP": lambda: one_pass(visual, images, proposals),
        f"{count} crops": lambda: crops(visual, images, proposals),
        f"{count} crops, without CLIP": lambda: crops(NoClip(), images, proposals),
    }
    with torch.inference_mode():
        timings = in_turns(forms, repeats=repeats, device=device)
    once, cropped, cutting = (statistics.median(timings[name]) for name in forms)
    print(
        f"{count} crops take {cropped / once:.1f} times as long as IP-CLIP (medians), {(cropped - cutting) / once:.1f}"
    )
    print("times without the making of the crops")
    return timings


def training_model(config: str, device: torch.device) -> nn.Module:
    """The model of a file in ``configs``, without its dataset."""
    torch.manual_seed(0)
    cfg = load_config(CONFIGS / config, ["MODEL.DEVICE", str(device), "DATASETS.TRAIN", "()"])
    return build_model(cfg).train()


def mta_clip(*, repeats: int, device: torch.device, segments: int = 16, few: int = 8) -> Timings:
    """Training steps, forward and backward, on one 512 x 512 image: Mask2Former and MTA-CLIP on CLIP's ResNet-50, with
    3 x 150 texts for ADE20K; the texts alone; and a few of them cut to 13 tokens beside all 77.

    In bfloat16 autocast on a GPU, as in the recipes; in float32 on a CPU, most of which are slower at bfloat16.
    """
    vocabulary = vocabulary_from_metadata(MetadataCatalog.get("ade20k_sem_seg_val"))
    masks = random_proposals(segments, stride=1, device=torch.device("cpu")).mask_logits[0] > 0
    instances = Instances((480, 480))
    instances.gt_classes, instances.gt_masks = torch.randint(0, len(vocabulary), (segments,)), BitMasks(masks)
    batch = [{"image": torch.randint(0, 256, (3, 512, 512)).float(), "instances": instances, "vocabulary": vocabulary}]
    baseline = training_model("mta_clip/baseline_ade20k_RN50.yaml", device)
    model = training_model("mta_clip/ade20k_RN50.yaml", device)
    encoder, contexts = model.clip.text, model.context_prompts.contexts
    names = [name.split(",")[0] for name in vocabulary.names[:few]]
    tokens = clip_tokenizer("RN50-quickgelu")(names)[:, : encoder.context_length - contexts.shape[1]].to(device)

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                value = loss()
            value.backward()

        return run

    forms = {
        "Mask2Former, step": step(lambda: sum(baseline(batch).values())),
        "MTA-CLIP, step": step(lambda: sum(model(batch).values())),
        "texts alone": step(lambda: model.text_embeds(vocabulary).sum()),
        f"core, {few} names": step(lambda: encoder(tokens, contexts=contexts).sum()),
        f"core, plain form, {few} names": step(lambda: encoder.token_states(tokens, contexts=contexts).sum()),
    }
    timings = in_turns(forms, repeats=repeats, device=device)
    base, whole, texts = (statistics.median(timings[name]) for name in list(forms)[:3])
    print(f"MTA-CLIP adds {whole - base:.0f} ms to a step of {base:.0f} ms; its texts take {texts:.0f} ms (medians)")
    return timings


#: Seconds after which a timing of FGA-seg is not repeated: the largest vocabulary is timed once.
SLOW = 2


class PlantedScores(nn.Module):
    """An auxiliary head that makes its convolution, and prefers the first classes, each at some pixels, to all others.

    Args:
        conv: the learned head.
        planted: how many classes are preferred.
        total: how many there are in all its calls for an image, which may come in chunks; None: in one call.
    """

    def __init__(self, conv: nn.Conv2d, planted: int, total: int | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.planted = planted
        self.total = total
        self.start = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = self.start + torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)
        self.start = 0 if self.total is None else (self.start + len(x)) % self.total
        scores = torch.rand_like(x[:, :1]).where(ids < self.planted, -ids.float())
        return self.conv(x) * 0 + scores


@contextmanager
def planted_classes(head: CostHead, planted: int, total: int):
    """Let the auxiliary heads prefer ``planted`` of ``total`` classes."""
    learned = head.aux_head, head.decoder.aux_heads
    head.aux_head = PlantedScores(learned[0], planted, total)
    head.decoder.aux_heads = nn.ModuleList(PlantedScores(conv, planted) for conv in learned[1])
    yield
    head.aux_head, head.decoder.aux_heads = learned


def time_and_memory(
    function: Callable[[], object], *, repeats: int, device: torch.device
) -> tuple[list[float], float, float]:
    """Milliseconds of ``repeats`` calls, fewer if they are slow; those of the CPU for one, whatever else it was doing;
    the MiB at their peak beyond what was there."""
    before = begin_peak(device)
    timings, cpu_start = [], time.process_time()
    while len(timings) < repeats and sum(timings) < 1e3 * SLOW:
        start = clock(device)
        function()
        timings.append(1e3 * (clock(device) - start))
    cpu = 1e3 * (time.process_time() - cpu_start) / len(timings)
    return timings, cpu, peak(device) - before


def cost_volume_figures(
    repeats: int, device_name: str, threads: int, sizes: Sequence[int] = (20, 150, 847), whole: bool = True
) -> Timings:
    """Print and return what :func:`fgaseg` says; for a process of its own."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device(device_name)
    options = ["MODEL.DEVICE", device_name, "DATASETS.TRAIN", "()", "MODEL.OVSEG.CLIP.PRETRAINED", ""]
    options += ["MODEL.OVSEG.TEST.SLIDING.SIZE", "0"]
    cfg = load_config(CONFIGS / "fga_seg" / "coco_stuff_ViTB16_fast.yaml", options)
    model = build_model(cfg).eval()
    head, dim, timings = model.cost_head, model.clip.embed_dim, {}

    def measure(name: str, function: Callable[[], object], classes: int, planted: int, top_k: int) -> None:
        head.top_k = top_k
        kept: list[int] = []
        handle = head.decoder.head.register_forward_pre_hook(lambda _module, args: kept.append(len(args[0])))
        attending = min(classes, head.max_classes or classes)
        with planted_classes(head, planted, attending), torch.inference_mode():
            values, cpu, mebibytes = time_and_memory(function, repeats=repeats, device=device)
        handle.remove()
        timings[name] = values
        survivors = sum(kept) // len(values)
        k, shown = top_k or "all", planted if top_k else "-"
        print(
            f"{name.split(',')[0]:<12}{classes:>8}{shown:>9}{k:>6}{survivors:>11}"
            f"{statistics.median(values):>11.0f}{cpu:>9.0f}{mebibytes:>9.0f}",
            flush=True,
        )

    print(f"{'part':<12}{'classes':>8}{'planted':>9}{'k':>6}{'survivors':>11}{'median ms':>11}{'CPU ms':>9}{'MiB':>9}")
    for classes in sizes:
        dense, text = torch.randn(1, dim, 24, 24, device=device), torch.randn(1, classes, 1, dim, device=device)
        widths = cfg.MODEL.OVSEG.FGA_SEG.DECODER_GUIDANCE_DIMS
        features = [
            torch.randn(1, width, 24 * f, 24 * f, device=device) for width, f in zip(widths, (2, 4), strict=True)
        ]
        cases = [(planted, k) for planted in (10, 30) for k in (1, 4, 8, 16, 32) if max(planted, k) < classes]
        head.max_classes = 0
        with torch.inference_mode():
            head(dense, text[:, :4], features)  # warms up
        for planted, k in [*cases, (classes, 16), (classes, 0)]:
            name = f"cost volume, {classes} classes, {planted} planted, k {k or 'all'}"
            measure(name, lambda x=(dense, text, features): head(*x), classes, planted, k)
    if not whole:
        return timings
    vocabulary = Vocabulary(names=tuple(f"class {i}" for i in range(classes)), is_thing=(False,) * classes)
    embeds = F.normalize(text[0], dim=-1)
    nothing = torch.zeros(classes, dtype=torch.bool, device=device)
    ids = torch.arange(classes, device=device)
    model.text = lambda _vocabulary: TextClasses(embeds=embeds, class_ids=ids, is_thing=nothing, seen=nothing)
    batch = [{"image": torch.randint(0, 256, (3, 384, 384)).float(), "vocabulary": vocabulary}]
    for name, k, limit in (("whole model", 16, 0), ("of 256", 16, 256), ("of 256", 0, 256)):
        head.max_classes = limit
        measure(f"{name}, {classes} classes, k {k or 'all'}", lambda: model(batch), classes, 30, k)
    return timings


def fgaseg(*, repeats: int, device: torch.device) -> Timings:
    """FGA-seg's cost volume of one image, 24 x 24 positions, widths as for ViT-B/16 (table VI in kind).

    How many classes survive the choice of the best k of each pixel depends on the image, so that is planted: 10 or 30
    classes score higher than all others everywhere, each best at some pixels, and the others' order is the same
    everywhere; or each class is among the best 16 of some pixel ("planted" equal to "classes"), so that all survive,
    as with k "all", which rules none out. MAX_CLASSES is 0, every class attends. Last the whole model with texts given,
    one 384 x 384 image at once to its scores, also with MAX_CLASSES 256 ("of 256"). MiB are the peak beyond the weights
    and the inputs.
    """
    # Tensors are given back at once, so that the peak is one of tensors that are there together (glibc).
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**25)
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(cost_volume_figures, repeats, str(device), torch.get_num_threads()).result()


def materialised(module: LocalConsensusAttention, x: torch.Tensor) -> torch.Tensor:
    """The module's attention of all pixels, with all its weights in memory: (N, h, w, C) -> (N, h, w, C)."""
    q, k, v = module.qkv(x).flatten(1, 2).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (module.scale * q @ k.mT).softmax(dim=-1)
    return module.out((weights @ v).transpose(1, 2).flatten(-2)).view_as(x)


def lcsa_figures(repeats: int, device_name: str, threads: int, side: int, forms: Sequence[str]) -> Timings:
    """Print and return what :func:`lcsa` says for maps of one side; for a process of its own."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device(device_name)
    module = LocalConsensusAttention(dim=512).to(device)
    # Neighbours alike, as in features of images, so that windows differ.
    x = F.interpolate(torch.randn(1, 512, side // 8, side // 8, device=device), size=(side, side), mode="bilinear")
    x = F.layer_norm(x.permute(0, 2, 3, 1) + 0.5 * torch.randn(1, side, side, 512, device=device), (512,))

    def attend(form: str) -> torch.Tensor:
        if form == "all pixels, materialised":
            return materialised(module, x)
        module.top_k, module.form = (0, "auto") if form == "all pixels" else (16, form)
        return module(x)

    def forward(form: str) -> Callable[[], object]:
        def run() -> None:
            with torch.inference_mode():
                attend(form)

        return run

    def step(form: str) -> Callable[[], object]:
        return lambda: attend(form).square().mean().backward()

    timings: Timings = {}
    print(f"\n{side} x {side}{'':<28}{'median ms':>12}{'MiB':>9}{'step, ms':>12}{'MiB':>9}")
    with torch.inference_mode():
        module(x)  # warms up
    memory = {f: [time_and_memory(kind(f), repeats=1, device=device)[2] for kind in (forward, step)] for f in forms}
    for kind, name in ((forward, "forward"), (step, "step")):
        functions = {f"{form}, {side} x {side}, {name}": kind(form) for form in forms}
        timings |= in_turns(functions, repeats=repeats, device=device)
    for form, mebibytes in memory.items():
        medians = [statistics.median(timings[f"{form}, {side} x {side}, {name}"]) for name in ("forward", "step")]
        figures = "".join(f"{t:>12.1f}{m:>9.0f}" for t, m in zip(medians, mebibytes, strict=True))
        print(f"{form:<35}{figures}", flush=True)
    return timings


LCSA_FORMS = ("gather", "dense", "all pixels", "all pixels, materialised")


def lcsa(
    *, repeats: int, device: torch.device, sides: Sequence[int] = (32, 64), forms: Sequence[str] = LCSA_FORMS
) -> Timings:
    """LDVC's local-consensus attention on a map of 512 channels, 8 heads, the best 16 windows of 4 x 4: keys and values
    gathered, or attention of all pixels masked; beside it attention of all pixels, fused and with all its weights in
    memory. Forward, and a step of forward and backward; MiB are the peak beyond the weights and the input.
    """
    # Tensors are given back at once, so that the peak is one of tensors that are there together (glibc).
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    timings: Timings = {}
    for side in sides:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            figures = pool.submit(lcsa_figures, repeats, str(device), torch.get_num_threads(), side, forms)
            timings |= figures.result()
    return timings


BENCHMARKS = {
    "deformable": deformable,
    "mask2former": mask2former,
    "text": text,
    "maft": maft,
    "mta_clip": mta_clip,
    "fgaseg": fgaseg,
    "lcsa": lcsa,
}


def report(name: str, timings: Timings) -> None:
    print(f"\n{name}\n{'part':<34}{'min ms':>10}{'median ms':>12}")
    for part, values in timings.items():
        print(f"{part:<34}{min(values):>10.1f}{statistics.median(values):>12.1f}")
    for part, values in timings.items():
        plain = timings.get(part.replace("core,", "core, plain form,"))
        if plain and plain is not values:
            ratio = statistics.median(plain) / statistics.median(values)
            print(f"{part}: {ratio:.2f} times as fast as the plain form (medians)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(BENCHMARKS), action="append", help="this benchmark; can be repeated")
    parser.add_argument("--repeats", type=int, default=7, help="counted runs (default 7)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="also write all timings to this JSON file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} CPU threads, {args.repeats} repeats")
    results = {}
    for name in args.only or BENCHMARKS:
        results[name] = BENCHMARKS[name](repeats=args.repeats, device=device)
        report(name, results[name])
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
