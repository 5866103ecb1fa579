"""A vocabulary through the text tower of CLIP."""

from __future__ import annotations

import torch
from detectron2.data import MetadataCatalog
from torch.nn import functional as F

import ovseg_d2.data  # noqa: F401  (registers the datasets)
from ovseg_d2.data.templates import get_templates
from ovseg_d2.modeling.clip.build import build_clip, clip_tokenizer
from ovseg_d2.modeling.text_classifier import TextClassifier
from ovseg_d2.structures import Vocabulary
from tools.benchmarks.timing import Timings, clock, in_turns
from tools.memory import peak


def run(*, repeats: int, device: torch.device, names: int = 847, compared_names: int = 16) -> Timings:
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
    memory = [peak(device)]
    encoder.weights_hash()  # taken once at load, so not part of the time
    start = clock(device)
    cut(names)
    seconds = clock(device) - start
    memory.append(peak(device))
    difference = float((whole(few) - cut(few)).abs().max())
    memory.append(peak(device))
    print(f"{names} names x {len(templates)} templates, cut: {seconds:.1f} s; {few} names with 77 tokens beside it")
    print(f"peak memory: {memory[0]:.0f} MiB before, {memory[1]:.0f} cut, {memory[2]:.0f} with 77 tokens")
    print(f"largest difference of the unit vectors: {difference:.1e}")
    forms = {f"core, {few} names": lambda: cut(few), f"core, plain form, {few} names": lambda: whole(few)}
    return in_turns(forms, repeats=repeats, device=device)
