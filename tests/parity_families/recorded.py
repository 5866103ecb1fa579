"""What recorded cases of mask classification share: weights, random draws, targets, proposals and results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ovseg_d2.checkpoint.convert import convert_state_dict
from ovseg_d2.modeling.losses.mask_losses import PointMaskLoss
from ovseg_d2.modeling.losses.set_criterion import SetCriterion
from ovseg_d2.structures import MaskProposals, SegmentationTargets
from tests.parity import Case


def load_params(module: nn.Module, params: dict[str, Tensor], *, official: str, ours: str) -> None:
    """Load weights by the road of real checkpoints, under the prefixes the module has in the whole model."""
    renamed, _ = convert_state_dict({official + key: value for key, value in params.items()})
    assert all(key.startswith(ours) for key in renamed), sorted(renamed)
    module.load_state_dict({key.removeprefix(ours): value for key, value in renamed.items()}, strict=True)


class RecordedDraws:
    """A point sampler that hands out recorded uniform draws in their order."""

    def __init__(self, draws: Sequence[Tensor]) -> None:
        self.draws = [draw for draw in draws if len(draw)]

    def start(self, image_ids: Sequence[int | str], device: torch.device) -> RecordedDraws:
        return self

    def __call__(self, counts: Sequence[int], num_points: int) -> Tensor:
        rows: list[Tensor] = []
        while sum(len(row) for row in rows) < sum(counts):
            rows.append(self.draws.pop(0))
        result = torch.cat(rows) if rows else torch.zeros(0, num_points, 2)
        assert result.shape == (sum(counts), num_points, 2), (result.shape, counts, num_points)
        return result


class FixedProposals(nn.Module):
    """Stands for a generator: the same proposals whatever the images."""

    def __init__(self, proposals: MaskProposals) -> None:
        super().__init__()
        self.proposals = proposals

    def forward(self, images: Any, features: Any = None, text: Any = None) -> MaskProposals:
        return self.proposals


def idle_criterion(num_classes: int) -> SetCriterion:
    """For models that only infer."""
    return SetCriterion(
        num_classes=num_classes,
        class_weight=2.0,
        mask_weight=5.0,
        dice_weight=5.0,
        no_object_weight=0.1,
        mask_loss=PointMaskLoss(num_points=32),
    )


def recorded_targets(case: Case, labels: str = "target_labels_{}", masks: str = "target_masks_{}") -> list[Any]:
    return [
        SegmentationTargets(class_ids.long(), image_masks.bool())
        for class_ids, image_masks in zip(case.indexed(labels), case.indexed(masks), strict=True)
    ]


def result_outputs(results: list[dict[str, Any]]) -> dict[str, Any]:
    """detectron2's results under the names of the recorded outputs."""
    outputs: dict[str, Any] = {}
    for i, result in enumerate(results):
        if "sem_seg" in result:
            outputs[f"sem_seg_{i}"] = result["sem_seg"]
        if "panoptic_seg" in result:
            outputs[f"panoptic_seg_{i}"] = result["panoptic_seg"][0]
        if "instances" in result:
            instances = result["instances"]
            outputs[f"instance_scores_{i}"] = instances.scores
            outputs[f"instance_classes_{i}"] = instances.pred_classes
            outputs[f"instance_masks_{i}"] = instances.pred_masks
            outputs[f"instance_boxes_{i}"] = instances.pred_boxes.tensor
    outputs["segments_info"] = [result["panoptic_seg"][1] for result in results if "panoptic_seg" in result]
    return outputs
