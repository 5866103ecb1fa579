"""Labels of unseen classes by the model that is trained: the transductive setting of ZegCLIP (arXiv 2212.03588)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ovseg_d2.structures import Vocabulary


def unseen_ids(vocabulary: Vocabulary) -> list[int]:
    """The classes that a zero-shot split leaves out of training, ascending; empty without a split."""
    return [i for i, is_seen in enumerate(vocabulary.is_seen) if not is_seen]


@torch.no_grad()
def pseudo_labels(logits: Tensor, labels: Tensor, unseen: Sequence[int]) -> Tensor:
    """Give the pixels of unseen classes the unseen class that the model finds the most likely.

    Where the unseen classes are is known, which of them it is is not. No threshold, and no average of models: the
    prediction of the current iteration, as in the public code.

    Args:
        logits: (N, K, h, w), resized bilinearly to the labels.
        labels: (N, H, W) int64, classes in [0, K), or anything else where there is none.
        unseen: class numbers; pixels of all of them are treated alike.

    Returns:
        (N, H, W) int64, a new tensor.

    Raises:
        ValueError: a class that the logits do not have.
    """
    num_classes = logits.shape[1]
    if outside := [i for i in unseen if not 0 <= i < num_classes]:
        raise ValueError(f"pseudo labels: unseen class {outside[0]}, expected 0..{num_classes - 1}")
    if not unseen:
        return labels.clone()
    ids = torch.tensor(list(unseen), device=labels.device)
    resized = F.interpolate(logits[:, ids].float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(torch.isin(labels, ids), ids[resized.argmax(dim=1)], labels)
