"""Set prediction loss of Mask2Former (arXiv 2112.01527, sections 3.2.3 and 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.layers.point_sampling import PointSampler, UniformDraws, sample_points, uncertain_points
from ovseg_d2.modeling.losses.matcher import HungarianMatcher, Match
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


def point_mask_losses(point_logits: Tensor, point_targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over masks of the mean cross-entropy and of the dice loss: (R, P) logits, (R, P) in [0, 1] -> scalars."""
    ce = F.binary_cross_entropy_with_logits(point_logits, point_targets, reduction="none").mean(1).sum()
    probs = point_logits.sigmoid()
    overlap = 2 * (probs * point_targets).sum(-1)
    dice = 1 - (overlap + 1) / (probs.sum(-1) + point_targets.sum(-1) + 1)
    return ce, dice.sum()


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
        num_points: int,
        oversample_ratio: float,
        importance_ratio: float,
        deep_supervision: bool = True,
        sampler: PointSampler | None = None,
    ) -> None:
        """
        Args:
            num_classes: K of a closed vocabulary. The loss takes K from the logits, whose last class is "no object".
            no_object_weight: its weight in the cross-entropy; other classes have 1.
            class_weight, mask_weight, dice_weight: weights of the losses, and of the matching costs.
            num_points: points a mask for costs and losses.
            deep_supervision: whether earlier predictions are trained too.
        """
        super().__init__()
        self.weights = {"loss_ce": class_weight, "loss_mask": mask_weight, "loss_dice": dice_weight}
        self.matcher = HungarianMatcher(
            class_weight=class_weight, mask_weight=mask_weight, dice_weight=dice_weight, num_points=num_points
        )
        self.num_classes = num_classes
        self.num_points = num_points
        self.oversample_ratio, self.importance_ratio = oversample_ratio, importance_ratio
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
            num_points=loss.NUM_POINTS,
            oversample_ratio=loss.OVERSAMPLE,
            importance_ratio=loss.IMPORTANCE,
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
        draws = self.sampler.start(image_ids, proposals.mask_logits.device)
        # Once for all predictions: bilinear reads need floats.
        targets = [SegmentationTargets(target.class_ids, target.masks.float()) for target in targets]
        num_masks = proposals.mask_logits.new_tensor(float(sum(len(target) for target in targets)))
        num_masks = all_reduced_mean(num_masks).clamp(min=1)

        losses = self._losses(proposals, targets, draws, num_masks)
        if self.deep_supervision:
            for i, aux in enumerate(proposals.aux):
                aux_losses = self._losses(aux, targets, draws, num_masks)
                losses.update({f"{name}_{i}": loss for name, loss in aux_losses.items()})
        return losses

    def _losses(
        self,
        proposals: MaskProposals,
        targets: Sequence[SegmentationTargets],
        draws: UniformDraws,
        num_masks: Tensor,
    ) -> dict[str, Tensor]:
        with torch.autocast(device_type=proposals.mask_logits.device.type, enabled=False):
            matches = self.matcher(proposals, targets, draws)
            loss_mask, loss_dice = self.mask_losses(proposals.mask_logits.float(), targets, matches, draws)
            losses = {
                "loss_ce": self.class_loss(proposals.class_logits.float(), targets, matches),
                "loss_mask": loss_mask / num_masks,
                "loss_dice": loss_dice / num_masks,
            }
        return {name: self.weights[name] * loss for name, loss in losses.items()}

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
            row[queries.to(row.device)] = target.class_ids[matched.to(row.device)]
        total = F.cross_entropy(class_logits.transpose(1, 2), class_ids, weight, reduction="sum")
        return total / all_reduced_mean(weight[class_ids].sum())

    def mask_losses(
        self,
        mask_logits: Tensor,
        targets: Sequence[SegmentationTargets],
        matches: Sequence[Match],
        draws: UniformDraws,
    ) -> tuple[Tensor, Tensor]:
        """Sums over the matched masks of both mask losses, on points that favour uncertain places.

        Args:
            mask_logits: (N, Q, h, w).
        """
        device = mask_logits.device
        matches = [(queries.to(device), matched.to(device)) for queries, matched in matches]
        counts = [len(queries) for queries, _ in matches]
        images = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))
        logits = mask_logits[images, torch.cat([queries for queries, _ in matches])][:, None]
        with torch.no_grad():
            points = self.loss_points(logits, draws, counts)
            point_targets = torch.cat(
                [
                    # Points are put in the targets' order, so that no full-size mask is copied.
                    _sample_matched(target.masks, matched, image_points)
                    for target, (_, matched), image_points in zip(targets, matches, points.split(counts), strict=True)
                ]
            )
        return point_mask_losses(sample_points(logits, points)[:, 0], point_targets)

    def loss_points(self, matched_logits: Tensor, draws: UniformDraws, counts: Sequence[int]) -> Tensor:
        """(R, 1, h, w) logits of matched masks, image after image -> (R, P, 2)."""
        return uncertain_points(
            matched_logits,
            draws,
            counts,
            num_points=self.num_points,
            oversample_ratio=self.oversample_ratio,
            importance_ratio=self.importance_ratio,
        )


def _sample_matched(masks: Tensor, matched: Tensor, points: Tensor) -> Tensor:
    """Values of ``masks[matched]`` (R of M, H, W) at points (R, P, 2) -> (R, P)."""
    order = matched.argsort()
    chosen = masks if len(matched) == len(masks) else masks[matched[order]]
    sampled = sample_points(chosen[:, None], points[order])[:, 0]
    return sampled[order.argsort()]
