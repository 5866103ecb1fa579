"""MaskCLIP++'s classification loss of ground-truth masks (arXiv 2412.11464, appendix C.2 and Table 14)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("ce", "bce")


class MaskClassificationLoss(nn.Module):
    """Cross-entropy of masks, each image and each of its classes counting alike (the paper's "class-reweighted": not by
    the frequency in the data)."""

    def __init__(self, *, kind: str = "ce", balanced: bool = True, temperature: float = 1.0) -> None:
        """
        Args:
            kind: ce, over all classes of the training; bce, each class for itself.
            balanced: the mean over the masks of a class, then over the classes in an image, then over the images;
                False: over all masks.
            temperature: logits are divided by it.

        Raises:
            ValueError: another kind.
        """
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"MODEL.OVSEG.MASKCLIPPP.LOSS is {kind!r}; allowed are {', '.join(KINDS)}")
        self.kind, self.balanced, self.temperature = kind, balanced, temperature

    def forward(self, logits: Tensor, class_ids: Tensor, images: Tensor) -> Tensor:
        """
        Args:
            logits: (R, K) of the masks of all images.
            class_ids: (R,) int64 in [0, K).
            images: (R,) int64, the image of each mask.

        Returns:
            Scalar; zero, and connected to ``logits``, without masks.
        """
        if not len(logits):
            return logits.sum()
        logits = logits.float() / self.temperature
        if self.kind == "ce":
            errors = F.cross_entropy(logits, class_ids, reduction="none")
        else:
            one_hot = F.one_hot(class_ids, logits.shape[1]).to(logits.dtype)
            errors = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").mean(dim=1)
        return (errors * self._weights(class_ids, images)).sum() if self.balanced else errors.mean()

    @staticmethod
    def _weights(class_ids: Tensor, images: Tensor) -> Tensor:
        """(R,) 1 / (images with masks * classes in the image * masks of the class in the image)."""
        pairs, pair_of, count = torch.stack([images, class_ids]).unique(dim=1, return_inverse=True, return_counts=True)
        image_ids, classes_in = pairs[0].unique(return_counts=True)
        index = torch.searchsorted(image_ids, images)
        return 1 / (len(image_ids) * classes_in[index] * count[pair_of])
