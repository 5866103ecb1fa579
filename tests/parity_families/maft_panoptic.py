"""FreeSeg's panoptic results from class scores of its ensemble."""

from __future__ import annotations

from typing import Any

import torch

from ovseg_d2.modeling.inference.freeseg_inference import named_masks, painted_segments
from ovseg_d2.modeling.mask_classification.host_ensemble import HostEnsemble
from tests.parity import Case


def freeseg_panoptic(case: Case) -> dict[str, Any]:
    """Instances are no output: the reference's are known to be wrong."""
    meta, x = case.meta, case.inputs
    mask_logits, num_classes = x["mask_logits"], x["clip_logits"].shape[-1] - 1
    scores = HostEnsemble(name="zsseg", weight=meta["lambda"])(
        x["clip_logits"][None, :, :-1],
        x["seen_flag"] > 0.5,
        proposal_logits=x["mask_cls_logits"][None],
        # Crops of masks without any pixel are not made.
        valid=(mask_logits > 0).flatten(1).any(1)[None],
    )[0]
    named = named_masks(scores, mask_logits)
    # The reference takes the number of its training classes for the index of "no object", whatever class has it.
    named = named[named.labels != meta["sem_seg_head.num_classes"]]
    is_thing = torch.isin(torch.arange(num_classes), torch.tensor(meta["thing_classes"]))
    ids, segments = painted_segments(
        named, is_thing=is_thing, object_mask_threshold=0.5, overlap_threshold=meta["overlap_threshold"]
    )
    return {
        "panoptic_seg": ids,
        **{
            name: torch.tensor([int(segment[key]) for segment in segments])
            for name, key in (("seg_ids", "id"), ("seg_cats", "category_id"), ("seg_isthing", "isthing"))
        },
    }


TOPICS = {"maft/freeseg_panoptic_instance": freeseg_panoptic}
