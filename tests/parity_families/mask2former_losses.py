"""Mask2Former's losses: sampling of points, matcher, criterion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ovseg_d2.modeling.layers.point_sampling import sample_points, uncertain_points
from ovseg_d2.modeling.losses.mask_losses import PointMaskLoss
from ovseg_d2.modeling.losses.matcher import HungarianMatcher
from ovseg_d2.modeling.losses.set_criterion import SetCriterion
from ovseg_d2.structures import MaskProposals
from tests.parity import Case
from tests.parity_families.recorded import RecordedDraws, recorded_targets


def point_sampling(case: Case) -> dict[str, Any]:
    ctor, logits = case.meta["constructor"], case.inputs["logits"]
    points = uncertain_points(
        logits,
        RecordedDraws(case.indexed("rand_{}")),
        [len(logits)],
        num_points=ctor["num_points"],
        oversample_ratio=ctor["oversample_ratio"],
        importance_ratio=ctor["importance_sample_ratio"],
    )
    return {
        "point_coords": points,
        "sampled_logits": sample_points(logits, points),
        "sampled_labels": sample_points(case.inputs["labels"], points),
    }


def matcher(case: Case) -> dict[str, Any]:
    ctor = case.meta["constructor"]
    module = HungarianMatcher(
        class_weight=ctor["cost_class"],
        mask_weight=ctor["cost_mask"],
        dice_weight=ctor["cost_dice"],
        mask_loss=PointMaskLoss(num_points=ctor["num_points"]),
    )
    proposals = MaskProposals(class_logits=case.inputs["pred_logits"], mask_logits=case.inputs["pred_masks"])
    targets, points = recorded_targets(case), case.indexed("point_coords_{}")
    outputs = {}
    for i, costs in enumerate(module.costs(proposals, targets, RecordedDraws(points))):
        outputs[f"cost_class_{i}"] = costs.class_cost
        outputs[f"cost_mask_{i}"] = costs.mask_cost
        outputs[f"cost_dice_{i}"] = costs.dice_cost
        outputs[f"cost_total_{i}"] = module.total_cost(costs)
    for i, (queries, matched) in enumerate(module(proposals, targets, RecordedDraws(points))):
        outputs[f"src_idx_{i}"], outputs[f"tgt_idx_{i}"] = queries, matched
    return outputs


def criterion(case: Case) -> dict[str, Any]:
    ctor = case.meta["constructor"]
    weights = ctor["weights"]
    mask_loss = PointMaskLoss(
        num_points=ctor["num_points"],
        oversample_ratio=ctor["oversample_ratio"],
        importance_ratio=ctor["importance_sample_ratio"],
    )
    module = SetCriterion(
        num_classes=ctor["num_classes"],
        class_weight=weights["loss_ce"],
        mask_weight=weights["loss_mask"],
        dice_weight=weights["loss_dice"],
        no_object_weight=ctor["eos_coef"],
        mask_loss=mask_loss,
        sampler=RecordedDraws(case.indexed("rand_{:02d}")),
    )
    matches: list[Any] = []
    module.matcher.register_forward_hook(lambda _module, _args, output: matches.append(output))
    points: list[Tensor] = []
    mask_loss.loss_points = recording(mask_loss.loss_points, points)

    names = ["final"]
    while f"aux_{len(names) - 1}/pred_logits" in case.inputs:
        names.append(f"aux_{len(names) - 1}")
    leaves = {key: case.inputs[key].clone().requires_grad_() for key in case.inputs if "pred_" in key}
    final, *aux = (
        MaskProposals(class_logits=leaves[f"{prefix}pred_logits"], mask_logits=leaves[f"{prefix}pred_masks"])
        for prefix in ("" if name == "final" else f"{name}/" for name in names)
    )
    final.aux = aux
    losses = module(final, recorded_targets(case), ["first", "second"])
    total = sum(losses.values())
    total.backward()
    outputs = {
        **{f"loss/{name}": loss / weights["_".join(name.split("_")[:2])] for name, loss in losses.items()},
        **{f"grad/{name}": leaf.grad for name, leaf in leaves.items()},
        "total_weighted": total,
    }
    for name, image_matches, coordinates in zip(names, matches, points, strict=True):
        outputs[f"point_coords/{name}"] = coordinates
        for i, (queries, matched) in enumerate(image_matches):
            outputs[f"match/{name}/src_{i}"], outputs[f"match/{name}/tgt_{i}"] = queries, matched
    return outputs


def recording(function: Callable[..., Tensor], calls: list[Tensor]) -> Callable[..., Tensor]:
    """``function``, whose results are also put into ``calls``."""

    def record(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(function(*args, **kwargs))
        return calls[-1]

    return record


TOPICS = {
    "mask2former/point_sampling": point_sampling,
    "mask2former/matcher": matcher,
    "mask2former/criterion": criterion,
}
