"""Training steps of MTA-CLIP beside Mask2Former's."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import BitMasks, Instances

import ovseg_d2.data  # noqa: F401  (registers the datasets)
from ovseg_d2.data.vocabulary import vocabulary_from_metadata
from ovseg_d2.modeling.clip.build import clip_tokenizer
from tools.benchmarks.random_parts import random_model, random_proposals
from tools.benchmarks.timing import Timings, in_turns


def run(*, repeats: int, device: torch.device, segments: int = 16, few: int = 8) -> Timings:
    """Training steps, forward and backward, on one 512 x 512 image: Mask2Former and MTA-CLIP on CLIP's ResNet-50, with
    3 x 150 texts for ADE20K; the texts alone; and a few of them cut to 13 tokens beside all 77.

    In bfloat16 autocast on a GPU, as in the recipes; in float32 on a CPU, most of which are slower at bfloat16.
    """
    vocabulary = vocabulary_from_metadata(MetadataCatalog.get("ade20k_sem_seg_val"))
    masks = random_proposals(segments, stride=1, device=torch.device("cpu")).mask_logits[0] > 0
    instances = Instances((480, 480))
    instances.gt_classes, instances.gt_masks = torch.randint(0, len(vocabulary), (segments,)), BitMasks(masks)
    batch = [{"image": torch.randint(0, 256, (3, 512, 512)).float(), "instances": instances, "vocabulary": vocabulary}]
    recipes = ("mta_clip/baseline_ade20k_RN50.yaml", "mta_clip/ade20k_RN50.yaml")
    baseline, model = (random_model(recipe, device)[0].train() for recipe in recipes)
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
