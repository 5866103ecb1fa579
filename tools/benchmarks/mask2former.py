"""Mask2Former R50, split by part."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.nn import functional as F
from tqdm import tqdm

from ovseg_d2.modeling.inference import mask_inference
from ovseg_d2.structures import Vocabulary
from tools.benchmarks.random_parts import random_model
from tools.benchmarks.timing import Timings, clock, in_turns, timed_modules


def run(
    *, repeats: int, device: torch.device, config: str = "mask2former/ade20k_semantic_R50.yaml", size: int = 512
) -> Timings:
    """Mask2Former R50, 100 queries, 9 decoder layers, 150 classes, one 512 x 512 image to semantic scores."""
    model, cfg = random_model(config, device)
    model.eval()
    names = tuple(f"class {i}" for i in range(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES))
    vocabulary = Vocabulary(names=names, is_thing=(False,) * len(names))
    batch = [{"image": torch.randint(0, 256, (3, size, size)).float(), "vocabulary": vocabulary}]
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
        mask_logits = F.interpolate(features.mask_logits, size=(size, size), mode="bilinear")[0]
        semantic = {"semantic inference": lambda: mask_inference.semantic_inference(class_probs, mask_logits)}
        timings |= in_turns(semantic, repeats=repeats, device=device)
    return timings
