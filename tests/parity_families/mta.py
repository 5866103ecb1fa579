"""MTA-CLIP: the mask-to-text contrastive loss, with its gradients."""

from __future__ import annotations

from typing import Any

import torch

from ovseg_d2.modeling.losses.alignment import MaskTextAlignment, best_contexts
from ovseg_d2.structures import SegmentationTargets
from tests.parity import Case


def mask_text_loss(case: Case) -> dict[str, Any]:
    config = case.meta["config"]
    pairs = [
        (queries[queries >= 0], classes[queries >= 0])
        for queries, classes in zip(case.inputs["query_idx"], case.inputs["class_idx"], strict=True)
    ]
    targets = [SegmentationTargets(classes, torch.zeros(len(classes), 1, 1)) for _, classes in pairs]
    matches = [(queries, torch.arange(len(queries))) for queries, _ in pairs]
    results: dict[str, Any] = {}
    for negatives in ("mix", "separate"):
        for normaliser in ("queries", "matched"):
            alignment = MaskTextAlignment(negatives=negatives, normaliser=normaliser, temperature=config["tau"])
            masks, texts = (case.inputs[name].clone().requires_grad_() for name in ("m_proj", "t_proj"))
            rows = texts.unflatten(1, (config["K"], config["Cn"]))
            loss = alignment(masks, rows, targets, matches)
            results[f"loss_{negatives}_{normaliser}"] = loss.detach().reshape(1)
            if normaliser == "queries":
                loss.backward()
                results[f"grad_m_{negatives}"], results[f"grad_t_{negatives}"] = masks.grad, texts.grad
    similarity = alignment.similarity(case.inputs["m_proj"], rows.detach())
    results["k_tilde"] = torch.cat(
        [best_contexts(similarity[i, queries], classes) for i, (queries, classes) in enumerate(pairs)]
    )
    return results


TOPICS = {"mta_eq/mask_text_loss": mask_text_loss}
