"""Set prediction loss of MaskFormer (arXiv 2107.06278, section 3.3) and Mask2Former (arXiv 2112.01527, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.layers.point_sampling import PointSampler, UniformDraws
from ovseg_d2.modeling.losses.focal_mask_loss import FocalMaskLoss
from ovseg_d2.modeling.losses.mask_losses import MaskLoss, Match, PointMaskLoss
from ovseg_d2.modeling.losses.matcher import HungarianMatcher
from ovseg_d2.structures import MaskProposals, SegmentationTargets


def all_reduced_mean(value: Tensor) -> Tensor:
    """Mean of a tensor over the processes, without gradient.

    A loss divided by the *mean* over processes of its normaliser, and averaged by DistributedDataParallel, equals the
    loss of one process on the whole batch.
    """
    value = value.detach().clone()
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(value)
        value /= comm.get_world_size()
    return value


class SetCriterion(nn.Module):
    """Classification, mask and dice losses of matched queries, for the last and all earlier predictions."""

    def __init__(
        self,
        *,
        num_classes: int,
        class_weight: float,
        mask_weight: float,
        dice_weight: float,
        no_object_weight: float,
        mask_loss: MaskLoss,
        deep_supervision: bool = True,
        sampler: PointSampler | None = None,
    ) -> None:
        """
        Args:
            num_classes: K of a closed vocabulary. The loss takes K from the logits, whose last class is "no object".
            no_object_weight: its weight in the cross-entropy; other classes have 1.
            class_weight, mask_weight, dice_weight: weights of the losses, and of the matching costs.
            mask_loss: how masks are compared, in losses and costs.
            deep_supervision: whether earlier predictions are trained too. All are: the public FreeSeg has no weight for
                the last but one of its eleven, as its decoder has a layer more than its loop over weights expects.
            sampler: source of random points.
        """
        super().__init__()
        self.weights = {"loss_ce": class_weight, "loss_mask": mask_weight, "loss_dice": dice_weight}
        self.matcher = HungarianMatcher(
            class_weight=class_weight, mask_weight=mask_weight, dice_weight=dice_weight, mask_loss=mask_loss
        )
        self.num_classes = num_classes
        self.mask_loss = mask_loss
        self.deep_supervision = deep_supervision
        self.sampler = sampler or PointSampler()
        self.no_object_weight = no_object_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> SetCriterion:
        loss = cfg.MODEL.OVSEG.LOSS
        return cls(
            num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            class_weight=loss.CLASS,
            mask_weight=loss.MASK,
            dice_weight=loss.DICE,
            no_object_weight=loss.NO_OBJECT,
            mask_loss=build_mask_loss(cfg),
            deep_supervision=loss.DEEP_SUPERVISION,
            sampler=PointSampler(seed=max(cfg.SEED, 0)),
        )

    def forward(
        self, proposals: MaskProposals, targets: Sequence[SegmentationTargets], image_ids: Sequence[int | str]
    ) -> dict[str, Tensor]:
        """
        Args:
            proposals: class_logits (N, Q, K + 1), mask_logits (N, Q, h, w), ``aux`` of the same shapes.
            targets: of the N images; masks (M_i, H, W) cover the padded images.
            image_ids: N ids, which key the random points.

        Returns:
            Weighted scalars ``loss_ce``, ``loss_mask``, ``loss_dice`` and, with ``_0``, ``_1``, ..., those of ``aux``.
        """
        return self.losses_and_matches(proposals, targets, image_ids)[0]

    def losses_and_matches(
        self, proposals: MaskProposals, targets: Sequence[SegmentationTargets], image_ids: Sequence[int | str]
    ) -> tuple[dict[str, Tensor], list[list[Match]]]:
        """As :meth:`forward`, with the matches of each prediction: those of ``aux`` (none without deep supervision),
        then of ``proposals`` itself."""
        draws = self.sampler.start(image_ids, proposals.mask_logits.device)
        # Once for all predictions.
        dtype = self.mask_loss.mask_dtype
        targets = [SegmentationTargets(target.class_ids, target.masks.to(dtype)) for target in targets]
        num_masks = proposals.mask_logits.new_tensor(float(sum(len(target) for target in targets)))
        num_masks = all_reduced_mean(num_masks).clamp(min=1)

        losses, last_matches = self._losses(proposals, targets, draws, num_masks)
        matches = []
        for i, aux in enumerate(proposals.aux if self.deep_supervision else ()):
            aux_losses, aux_matches = self._losses(aux, targets, draws, num_masks)
            losses.update({f"{name}_{i}": loss for name, loss in aux_losses.items()})
            matches.append(aux_matches)
        return losses, [*matches, last_matches]

    def _losses(
        self,
        proposals: MaskProposals,
        targets: Sequence[SegmentationTargets],
        draws: UniformDraws,
        num_masks: Tensor,
    ) -> tuple[dict[str, Tensor], list[Match]]:
        """Of one prediction, the weighted losses and the matches."""
        with torch.autocast(device_type=proposals.mask_logits.device.type, enabled=False):
            device = proposals.mask_logits.device
            matches = [
                (queries.to(device), matched.to(device)) for queries, matched in self.matcher(proposals, targets, draws)
            ]
            loss_mask, loss_dice = self.mask_loss.matched_losses(proposals.mask_logits.float(), targets, matches, draws)
            losses = {
                "loss_ce": self.class_loss(proposals.class_logits.float(), targets, matches),
                "loss_mask": loss_mask / num_masks,
                "loss_dice": loss_dice / num_masks,
            }
        return {name: self.weights[name] * loss for name, loss in losses.items()}, matches

    def class_loss(
        self, class_logits: Tensor, targets: Sequence[SegmentationTargets], matches: Sequence[Match]
    ) -> Tensor:
        """Cross-entropy over K + 1 classes, unmatched queries being "no object"; a weighted mean over all processes.

        The public implementation normalises by each process's own weights, so that its loss depends on how many
        processes share the batch.
        """
        no_object = class_logits.shape[-1] - 1
        weight = class_logits.new_ones(no_object + 1)
        weight[-1] = self.no_object_weight
        class_ids = class_logits.new_full(class_logits.shape[:2], no_object, dtype=torch.int64)
        for row, target, (queries, matched) in zip(class_ids, targets, matches, strict=True):
            row[queries] = target.class_ids[matched]
        total = F.cross_entropy(class_logits.transpose(1, 2), class_ids, weight, reduction="sum")
        return total / all_reduced_mean(weight[class_ids].sum())


def build_mask_loss(cfg: CfgNode) -> MaskLoss:
    """By ``MODEL.OVSEG.LOSS.MASK_LOSS``.

    Raises:
        ValueError: there is no such loss.
    """
    loss = cfg.MODEL.OVSEG.LOSS
    if loss.MASK_LOSS == "points":
        return PointMaskLoss(
            num_points=loss.NUM_POINTS, oversample_ratio=loss.OVERSAMPLE, importance_ratio=loss.IMPORTANCE
        )
    if loss.MASK_LOSS == "focal":
        return FocalMaskLoss()
    raise ValueError(f"MODEL.OVSEG.LOSS.MASK_LOSS is {loss.MASK_LOSS!r}; allowed are points, focal")
