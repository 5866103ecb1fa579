"""The best that a model's masks allow (MAFT, arXiv 2310.00240, appendix C.1, Table 7).

The other upper bound, perfect masks with the model's own classification, needs no evaluator: it is a run on masks from
``tools/export_proposals.py --from-annotations segments``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ovseg_d2.evaluation.gather import required_output
from ovseg_d2.evaluation.mask_recall import mask_ious
from ovseg_d2.evaluation.sem_seg import SemSegEvaluator, require_size


class OracleEvaluator(SemSegEvaluator):
    """The scores of :class:`SemSegEvaluator` for masks that the ground truth names (``MODEL.OVSEG.TEST.ORACLE``)."""

    task = "sem_seg_oracle"

    def predicted(self, image: dict, output: dict, gt: np.ndarray, source: str) -> np.ndarray:
        """Classes (H, W) int64 in [0, K], K where there is no mask, from ``mask_probs`` (Q, H, W) of an output.

        Raises:
            ValueError: the output has no masks, or they are of another size.
        """
        mask_probs: Tensor = required_output(output, "mask_probs", type(self).__name__)
        require_size(mask_probs, gt, source)
        labels = torch.from_numpy(gt).to(mask_probs.device)
        present = labels[labels != self._ignore_label].unique()
        none = len(self._class_names)
        if not len(present) or not len(mask_probs):
            return np.full(gt.shape, none)
        scores, best = oracle_sem_seg(mask_probs, labels, present).max(dim=0)
        return torch.where(scores > 0, present[best], none).cpu().numpy()


def oracle_sem_seg(mask_probs: Tensor, labels: Tensor, class_ids: Tensor) -> Tensor:
    """Class scores of every pixel with S_IoU (Q, M) in place of A^c: the sum over masks of IoU times mask probability.

    The paper has the IoU "between binary ground-truth masks and proposals": of a class's pixels and of the proposal's
    where its probability exceeds 0.5. Pixels without a label count in neither, as in mIoU.

    Args:
        mask_probs: (Q, H, W).
        labels: (H, W) int64.
        class_ids: (M,) the labels that are classes, each of them somewhere in ``labels``.

    Returns:
        (M, H, W).
    """
    labelled = torch.isin(labels, class_ids)
    segments = labels[labelled] == class_ids[:, None]
    ious = mask_ious(mask_probs[:, labelled] > 0.5, segments)
    return torch.einsum("qm,qhw->mhw", ious, mask_probs.float())
