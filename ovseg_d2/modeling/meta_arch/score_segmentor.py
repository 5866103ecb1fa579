"""What those pixel methods share whose windows are averaged, and whose results are resized, as scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ovseg_d2.modeling.inference.mask_inference import MaskInference, crop_and_resize
from ovseg_d2.modeling.meta_arch.pixel_segmentor import PixelSegmentor
from ovseg_d2.structures import ImageBatch, MaskProposals, Vocabulary


class ScoreSegmentor(PixelSegmentor):
    """Scores in [0, 1] of pixels. Windows are cut from an image without its padding."""

    #: Every class by itself, a sigmoid; False: a softmax over the classes.
    independent_classes = True

    def scores(self, logits: Tensor) -> Tensor:
        """(N, K, h, w) -> what stands for a probability, of the same shape."""
        return logits.float().sigmoid() if self.independent_classes else logits.float().softmax(dim=1)

    def batch_logits(self, images: ImageBatch, vocabulary: Vocabulary) -> Tensor:
        """Class logits (N, K, h, w) on the padded images, at any resolution."""
        return self.pixel_logits(images.tensor, vocabulary)

    def predict(self, images: ImageBatch, vocabulary: Vocabulary) -> MaskProposals:
        """As in the base class. Scores of windows are averaged, not logits; the results are what these are the logits
        of, on the padded images, or on images that the sliding window warps to one size."""
        window = self.sliding_window
        if window is None:
            return MaskProposals(mask_logits=self.batch_logits(images, vocabulary))

        def run(windows: Tensor) -> Tensor:
            return self.pixel_logits(windows, vocabulary)

        maps = []
        for image, (height, width) in zip(images.tensor, images.image_sizes, strict=True):
            scores = window.image_scores(run, image[:, :height, :width], self.scores)
            if not window.image_size:
                padding = (0, images.padded_size[1] - width, 0, images.padded_size[0] - height)
                scores = F.pad(scores, padding, mode="replicate")
            maps.append(scores)
        scores = torch.stack(maps) if len(maps) > 1 else maps[0][None]
        # In place: with many classes the scores are what fills the memory.
        return MaskProposals(mask_logits=scores.logit_() if self.independent_classes else scores.log_())

    def results(
        self,
        proposals: MaskProposals,
        images: ImageBatch,
        batched_inputs: Sequence[dict[str, Any]],
        vocabulary: Vocabulary,
        inference: MaskInference,
    ) -> list[dict[str, Any]]:
        """``sem_seg``: scores (K, H, W) in [0, 1], which are resized, not their logits."""
        warped = self.sliding_window is not None and self.sliding_window.image_size > 0
        results = []
        for scores, x, image_size in zip(
            self.scores(proposals.mask_logits).split(1), batched_inputs, images.image_sizes, strict=True
        ):
            output_size = (x.get("height", image_size[0]), x.get("width", image_size[1]))
            size = output_size if warped else images.padded_size
            if scores.shape[-2:] != size:
                scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
            if not warped:
                scores = crop_and_resize(scores[0], image_size=image_size, output_size=output_size)[None]
            results.append({"sem_seg": scores[0]})
        return results
