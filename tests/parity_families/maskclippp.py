"""MaskCLIP++: similarities, classification loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ovseg_d2.checkpoint.key_maps import MASKCLIPPP
from ovseg_d2.modeling.losses.mask_classification import MaskClassificationLoss
from ovseg_d2.modeling.mask_classification.parameterized_similarity import LinearSimilarity, PseudoTextSimilarity
from ovseg_d2.structures import TextClasses
from tests.parity import Case


def text_of(embeds: Tensor) -> TextClasses:
    every = torch.ones(len(embeds), dtype=torch.bool)
    return TextClasses(embeds, torch.arange(len(embeds)), every, every)


def weights_of(case: Case) -> dict[str, Tensor]:
    prefix = "" if any(name.startswith("psm.") for name in case.params) else "psm."
    renamed = {MASKCLIPPP.rename(prefix + name): tensor for name, tensor in case.params.items()}
    return {name.removeprefix("similarity."): tensor for name, tensor in renamed.items()}


def scale_of(case: Case, used: bool) -> Tensor | float:
    return case.inputs["logit_scale"].exp().clamp(max=100) if used else 1.0


@torch.no_grad()
def linear(case: Case) -> dict[str, Any]:
    ctor = case.meta["ctor"]
    module = LinearSimilarity(num_prompts=ctor["template_width"], width=ctor["corr_width"])
    module.load_state_dict(weights_of(case))
    text = text_of(case.inputs["t_embs"])
    scale = scale_of(case, case.meta["use_logit_scale"])
    masks = case.indexed("m_embs_{}")
    cos = [torch.einsum("qd,kpd->qkp", F.normalize(embeds, dim=-1), text.embeds) for embeds in masks]
    return {"cos": torch.cat(cos), "corrs": torch.cat([module(embeds[None], text, scale=scale)[0] for embeds in masks])}


@torch.no_grad()
def pseudo_text(case: Case) -> dict[str, Any]:
    ctor = case.meta["ctor"]
    module = PseudoTextSimilarity(
        dim=case.inputs["t_embs"].shape[-1],
        num_heads=ctor["num_heads"],
        dropout=ctor["attention_probs_dropout_prob"],
        normalise_dense=ctor["norm_visual_cond"],
        detach_dense=ctor["detach_visual_cond"],
        learn_scale=ctor["use_logit_scale"],
        residual=LinearSimilarity(num_prompts=ctor["template_width"], width=ctor["corr_width"])
        if ctor["corr_residual"]
        else None,
    ).eval()
    module.load_state_dict(weights_of(case))
    text, dense = text_of(case.inputs["t_embs"]), case.inputs["p_embs"]
    scale = scale_of(case, case.meta["model_use_logit_scale"])
    rows = F.normalize(text.embeds.mean(dim=1), dim=-1)
    return {
        "pseudo_text": module.pseudo_text(rows, dense),
        "text_after_ln": module.text_rows(text, dense),
        "corrs": torch.cat(
            [
                module(embeds[None], text, scale=scale, dense=dense[i : i + 1])[0]
                for i, embeds in enumerate(case.indexed("m_embs_{}"))
            ]
        ),
    }


def reweighted_ce(case: Case) -> dict[str, Any]:
    ctor, x = case.meta["ctor"], case.inputs
    logits = x["logits"].clone().requires_grad_()
    kept = x["areas"] > 0 if ctor["IGNORE_EMPTY"] else torch.ones(len(logits), dtype=torch.bool)
    module = MaskClassificationLoss(balanced=ctor["BALANCE_CLS"], temperature=ctor["TEMPERATURE"])
    loss = module(logits[kept], x["labels"].long()[kept], x["mask2batch"].long()[kept])
    loss.backward()
    return {"loss": loss, "grad_logits": logits.grad}


TOPICS = {
    "maskclippp/psm_linear": linear,
    "maskclippp/psm_pseudotext": pseudo_text,
    "maskclippp/reweighted_ce": reweighted_ce,
}
