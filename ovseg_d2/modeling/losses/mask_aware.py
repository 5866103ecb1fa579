"""MAFT's two losses (arXiv 2310.00240, section 4.2): CLIP's scores follow the quality of masks, and stay CLIP's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.losses.set_criterion import all_reduced_mean
from ovseg_d2.structures import SegmentationTargets


def soft_iou(mask_probs: Tensor, gt_masks: Tensor) -> Tensor:
    """S_IoU: intersection over union of soft masks with binary ones, without a threshold (as the public code has it).

    Args:
        mask_probs: (Q, H, W) in [0, 1].
        gt_masks: (M, H, W) bool or in {0, 1}.

    Returns:
        (M, Q) float32 in [0, 1].
    """
    gt, probs = gt_masks.flatten(1).float(), mask_probs.flatten(1).float()
    with torch.autocast(probs.device.type, enabled=False):  # areas are beyond half precision
        intersection = gt @ probs.T
    return intersection / (gt.sum(1)[:, None] + probs.sum(1) - intersection + 1e-7)


def normalized_iou(iou: Tensor, valid: Tensor | None = None) -> Tensor:
    """S_IoU^norm (equation 5): each ground-truth mask's best proposal gets 1, its worst 0.

    The paper leaves the axis open; the public code takes the minimum and maximum over the proposals of each mask.

    Args:
        iou: (M, Q).
        valid: (Q,) bool, proposals that are real; the others neither count nor matter.
    """
    if valid is not None:
        lowest, highest = (iou.masked_fill(~valid, fill) for fill in (float("inf"), float("-inf")))
        lowest, highest = lowest.amin(1, keepdim=True), highest.amax(1, keepdim=True)
        return ((iou - lowest) / (highest - lowest + 1e-8)).masked_fill(~valid, 0.0)
    lowest, highest = iou.amin(1, keepdim=True), iou.amax(1, keepdim=True)
    return (iou - lowest) / (highest - lowest + 1e-8)


def _kl_divergence(scores: Tensor, iou: Tensor) -> Tensor:
    """Of each pair, as probabilities that the mask is of the class. The paper does not say over what (Table 4(b)); as
    distributions over proposals, which have no level, they would leave open which class a proposal is of."""
    tiny = torch.finfo(scores.dtype).tiny
    cross_entropy = -iou * scores.clamp(min=tiny).log() - (1 - iou) * (1 - scores).clamp(min=tiny).log()
    return cross_entropy + torch.xlogy(iou, iou) + torch.xlogy(1 - iou, 1 - iou)


#: Table 4(b): (M, Q) scores and their targets -> (M, Q).
KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smooth_l1": lambda scores, iou: F.smooth_l1_loss(scores, iou, reduction="none"),
    "l1": lambda scores, iou: F.l1_loss(scores, iou, reduction="none"),
    "l2": lambda scores, iou: F.mse_loss(scores, iou, reduction="none"),
    "kl": _kl_divergence,
}


class MaskAwareLoss(nn.Module):
    """L_ma (equation 6): CLIP's score of a present class for a proposal approaches their normalised IoU."""

    def __init__(self, *, kind: str = "smooth_l1") -> None:
        """
        Args:
            kind: smooth_l1, l1, l2 or kl (Table 4b): means over the pairs of a ground-truth mask and a proposal.

        Raises:
            ValueError: another kind.
        """
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"MODEL.OVSEG.MAFT.LOSS is {kind!r}; allowed are {', '.join(KINDS)}")
        self.kind = kind

    def forward(
        self,
        clip_probs: Tensor,
        mask_probs: Tensor,
        targets: Sequence[SegmentationTargets],
        valid: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            clip_probs: (N, Q, K) CLIP's class probabilities of the proposals (A^c).
            mask_probs: (N, Q, H, W) the proposals, in [0, 1].
            targets: of the N images, a mask a class that is present; (M_i, H, W) on the same frame. Images without any
                add nothing.
            valid: (N, Q) bool, False where a row only fills the batch.

        Returns:
            Scalar; zero, and connected to ``clip_probs``, without any target.
        """
        total = clip_probs[..., :0].sum()
        count = clip_probs.new_zeros(())
        for i, target in enumerate(targets):
            used = None if valid is None else valid[i]
            if not len(target) or not clip_probs.shape[1] or (used is not None and not used.any()):
                continue
            with torch.no_grad():
                iou = normalized_iou(soft_iou(mask_probs[i], target.masks), used)
            errors = self._errors(clip_probs[i][:, target.class_ids].T.float(), iou, used)
            total = total + errors.sum()
            count = count + errors.numel()
        return total / all_reduced_mean(count).clamp(min=1)

    def _errors(self, scores: Tensor, iou: Tensor, used: Tensor | None) -> Tensor:
        """(M, Q) scores and targets -> (M, Q') for the proposals that are real."""
        if used is not None:
            scores, iou = scores[:, used], iou[:, used]
        return KINDS[self.kind](scores, iou)


def distill_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """L_dis (equation 8): the tuned CLIP's class probabilities of whole images against the frozen one's.

    Args:
        student_logits, teacher_logits: (N, K).

    Returns:
        Scalar, the mean over images and classes; not weighted.
    """
    return F.smooth_l1_loss(student_logits.float().softmax(-1), teacher_logits.float().softmax(-1))
