"""MAFT+: content-dependent transfer, representation compensation."""

from __future__ import annotations

from typing import Any

import torch

from ovseg_d2.checkpoint.key_maps import MAFT_PLUS
from ovseg_d2.modeling.losses.representation_compensation import representation_compensation_loss
from ovseg_d2.modeling.mask_classification.content_transfer import ContentDependentTransfer
from tests.parity import Case


@torch.no_grad()
def content_transfer(case: Case) -> dict[str, Any]:
    ctor = case.meta["ctor"]
    module = ContentDependentTransfer(dim=ctor["d_model"], num_heads=ctor["nhead"], panoptic=ctor["panoptic_on"])
    weights = {MAFT_PLUS.rename(name): tensor for name, tensor in case.params.items()}
    module.load_state_dict({name.removeprefix("content_transfer."): tensor for name, tensor in weights.items()})
    return {"text_classifier": module(case.inputs["text_classifier"], case.inputs["img_feat"])}


def compensation(case: Case) -> dict[str, Any]:
    student = case.inputs["student"].clone().requires_grad_()
    loss = representation_compensation_loss(student, case.inputs["teacher"])
    loss.backward()
    return {"loss": loss.reshape(1), "grad_student": student.grad}


TOPICS = {"maft/maftplus_cdt": content_transfer, "maft/maftplus_rc": compensation}
