"""Embeddings of many masks: MAFT's IP-CLIP in one pass, against crops."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

import torch

from ovseg_d2.modeling.clip.build import build_clip
from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD, ClipImageEncoder
from ovseg_d2.modeling.mask_classification.crops import CropEncoder
from ovseg_d2.modeling.mask_classification.mask_encoder import MaskEncoder
from ovseg_d2.structures import ClipFeatures, ImageBatch
from tools.benchmarks.random_parts import random_proposals
from tools.benchmarks.timing import Timings, in_turns
from tools.memory import begin_peak, in_own_process, peak

#: Of masks, whose memory is measured.
COUNTS = (25, 50, 100, 200)


def ip_clip(device: torch.device) -> ClipImageEncoder:
    """ViT-B/16 with MAFT's mask tokens."""
    torch.manual_seed(0)
    options = {"mask_mode": "maft", "start_layer": 8, "last_block": "none"}
    return build_clip("ViT-B-16", visual_kwargs=options, with_text=False).visual.to(device).eval().requires_grad_(False)


def memory_of_masks(count: int, device: torch.device) -> float:
    """MiB at the peak of one forward of IP-CLIP with ``count`` masks of 480 x 480, beyond the weights.

    Everything else is new, the image and the masks too. For a process of its own, where nothing is held from before.
    """
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


def run(
    *,
    repeats: int,
    device: torch.device,
    count: int = 100,
    counts: Sequence[int] = COUNTS,
    size: int = 480,
    crop_size: int = 224,
) -> Timings:
    """Proposals at stride 4 on one 480 x 480 image to embeddings: IP-CLIP in one pass, a crop of 224 x 224 each.

    Both as a model runs them, with the resizing of the masks. The difference to crops alone, without CLIP, is what
    CLIP takes for them.
    """
    for number in counts:
        mebibytes = in_own_process(partial(memory_of_masks, number, device))
        print(f"IP-CLIP, {number} masks: {mebibytes:.0f} MiB beyond the weights")
    visual = ip_clip(device)
    images = ImageBatch(tensor=torch.randn(1, 3, size, size, device=device), image_sizes=[(size, size)], image_ids=[0])
    proposals = random_proposals(count, stride=4, device=device, side=size)
    normalised = {"pixel_mean": CLIP_PIXEL_MEAN, "pixel_std": CLIP_PIXEL_STD}
    one_pass = MaskEncoder(**normalised).to(device)
    crops = MaskEncoder(**normalised, crops=CropEncoder(style="mask_crop", size=crop_size)).to(device)

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
