"""FreeSeg's generator: pixel features that look at the texts."""

from __future__ import annotations

from typing import Any

import torch

from ovseg_d2.modeling.proposals.context_interaction import ContextInteraction
from tests.parity import Case, Unsupported
from tests.parity_families.recorded import load_params


@torch.no_grad()
def interaction(case: Case) -> dict[str, Any]:
    ctor = case.meta["ctor"]
    if not ctor["use_layer_scale"]:
        raise Unsupported("use_layer_scale False")
    module = ContextInteraction(
        dim=ctor["q_dim"], text_dim=ctor["k_dim"], inner_dim=ctor["embed_dim"], num_heads=ctor["num_heads"]
    ).eval()
    load_params(module, case.params, official="sem_seg_head.interaction.", ours="proposals.interaction.")
    scales = case.indexed("ms{}")
    *maps, mask_features = module([*scales, case.inputs["mask_features"]], case.inputs["text_features"])
    return {"mask_features": mask_features, **{f"ms{i}": feature for i, feature in enumerate(maps)}}


TOPICS = {"maft/freeseg_interaction": interaction}
