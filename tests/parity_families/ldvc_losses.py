"""ZegCLIP's focal and dice loss, with its gradient."""

from __future__ import annotations

from typing import Any

from ovseg_d2.modeling.losses.focal_dice import FocalDiceLoss, class_areas
from ovseg_d2.modeling.losses.pixel_losses import IGNORED
from tests.parity import Case


def focal_dice_loss(case: Case) -> dict[str, Any]:
    ctor, labels = case.meta["constructor"], case.inputs["label"]
    labels = labels.masked_fill(labels == case.meta["ignore_index"], IGNORED)
    loss = FocalDiceLoss(focal_weight=ctor["mask_weight"], dice_weight=ctor["dice_weight"])
    logits = case.inputs["pred_masks"].clone().requires_grad_()
    losses = loss(logits, labels)
    sum(losses.values()).backward()
    results = {"grad_pred_masks": logits.grad}
    predictions = {"": losses}
    for i, aux in enumerate(case.indexed("aux_pred_masks_{}")):
        predictions[f"_{i}"] = loss(aux, labels)
    for suffix, parts in predictions.items():
        results[f"loss_mask{suffix}"] = parts["loss_focal"].detach().reshape(1)
        results[f"loss_dice{suffix}"] = parts["loss_dice"].detach().reshape(1)
    shown = class_areas(labels.flatten(1), ctor["num_classes"]) > 0
    results["num_masks"] = shown.sum().clamp(min=1).float().reshape(1)
    return results


TOPICS = {"zegclip/focal_dice_loss": focal_dice_loss}
