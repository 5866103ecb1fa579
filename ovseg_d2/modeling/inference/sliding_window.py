"""Logits of a large image from windows of the size that a model was trained with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from torch import Tensor
from torch.nn import functional as F


class SlidingWindow:
    """Windows at a stride, the last of a row or column moved back to the border; the mean counts where they overlap."""

    def __init__(
        self,
        *,
        size: int,
        stride: int,
        batch_size: int = 4,
        divisibility: int = 1,
        image_size: int = 0,
        whole_image: bool = False,
    ) -> None:
        """
        Args:
            size: pixels a side; an image with a shorter side has windows of its own length there.
            stride: pixels from one window to the next.
            batch_size: windows that go through the model at once.
            divisibility: of the sizes that the model takes, as images are padded to.
            image_size: pixels a side of the square that :meth:`image_scores` warps an image to; 0: as it is.
            whole_image: in :meth:`image_scores` the whole image, warped to a window, counts as much as all windows.

        Raises:
            ValueError: a size, stride or batch size that does not work.
        """
        if size < 1 or size % max(divisibility, 1):
            raise ValueError(
                f"MODEL.OVSEG.TEST.SLIDING.SIZE is {size}; expected a multiple of MODEL.OVSEG.SIZE_DIVISIBILITY, "
                f"{divisibility}"
            )
        if not 1 <= stride <= size:
            raise ValueError(f"MODEL.OVSEG.TEST.SLIDING.STRIDE is {stride}; expected 1 to SIZE, {size}")
        if batch_size < 1:
            raise ValueError(f"MODEL.OVSEG.TEST.SLIDING.BATCH is {batch_size}; expected at least 1")
        if image_size < 0:
            raise ValueError(f"MODEL.OVSEG.TEST.SLIDING.IMAGE_SIZE is {image_size}; expected pixels, or 0")
        self.size, self.stride, self.batch_size = size, stride, batch_size
        self.image_size, self.whole_image = image_size, whole_image

    @classmethod
    def from_config(cls, cfg: CfgNode, *, divisibility: int | None = None) -> SlidingWindow | None:
        """What ``MODEL.OVSEG.TEST.SLIDING`` says; None if it is off.

        Args:
            divisibility: of the sizes that the model takes; None: ``MODEL.OVSEG.SIZE_DIVISIBILITY``.
        """
        sliding = cfg.MODEL.OVSEG.TEST.SLIDING
        if not sliding.SIZE:
            return None
        return cls(
            size=sliding.SIZE,
            stride=sliding.STRIDE,
            batch_size=sliding.BATCH,
            divisibility=cfg.MODEL.OVSEG.SIZE_DIVISIBILITY if divisibility is None else divisibility,
            image_size=sliding.IMAGE_SIZE,
            whole_image=sliding.WHOLE_IMAGE,
        )

    def __call__(self, run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """
        Args:
            run: windows (B, 3, H', W') -> logits (B, K, h, w) at any resolution.
            images: (N, 3, H, W).

        Returns:
            (N, K, H, W), the mean of the logits of all windows over a pixel.
        """
        num_images, _, height, width = images.shape
        tops, lefts = self.starts(height), self.starts(width)
        size = (min(self.size, height), min(self.size, width))
        places = [(row, top, left) for row in range(num_images) for top in tops for left in lefts]
        total: Tensor | None = None
        for first in range(0, len(places), self.batch_size):
            chunk = places[first : first + self.batch_size]
            windows = [images[row, :, top : top + size[0], left : left + size[1]] for row, top, left in chunk]
            logits = _resized(run(torch.stack(windows)), size)
            if total is None:
                total = logits.new_zeros(num_images, logits.shape[1], height, width)
            for (row, top, left), one in zip(chunk, logits, strict=True):
                total[row, :, top : top + size[0], left : left + size[1]] += one
        assert total is not None, images.shape
        rows, columns = (
            _coverage(starts, span, length).to(total)
            for starts, span, length in ((tops, size[0], height), (lefts, size[1], width))
        )
        return total.div_(rows[:, None] * columns)

    def image_scores(
        self, run: Callable[[Tensor], Tensor], image: Tensor, scores_of: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Scores of one image, without padding, as the public CAT-Seg and FGA-seg make them.

        Args:
            run: windows (B, 3, H', W') -> logits (B, K, h, w) at any resolution.
            image: (3, H, W).
            scores_of: logits (B, K, H', W') -> scores, whose mean is taken.

        Returns:
            (K, H, W), or (K, S, S) of an image that was warped.
        """
        warped = image[None]
        if self.image_size:
            warped = _resized(warped, (self.image_size, self.image_size))
        size = (min(self.size, warped.shape[-2]), min(self.size, warped.shape[-1]))

        def scores(windows: Tensor) -> Tensor:
            return scores_of(_resized(run(windows), size))

        from_windows = self(scores, warped)[0]
        if not self.whole_image:
            return from_windows
        whole = _resized(scores(_resized(image[None], size)), (warped.shape[-2], warped.shape[-1]))[0]
        return (from_windows + whole) / 2

    def starts(self, length: int) -> list[int]:
        """The first pixels of the windows along a side of ``length`` pixels."""
        last = max(length - self.size, 0)
        return [*range(0, last, self.stride), last]


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) -> (N, C, *size)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _coverage(starts: list[int], span: int, length: int) -> Tensor:
    """(length,) how many windows of ``span`` pixels lie over each pixel."""
    place = torch.arange(length)
    first = torch.tensor(starts)[:, None]
    return ((place >= first) & (place < first + span)).sum(0)
