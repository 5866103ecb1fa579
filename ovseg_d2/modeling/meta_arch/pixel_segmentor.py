"""What the methods share that classify pixels instead of masks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.inference.mask_inference import MaskInference, crop_and_resize
from ovseg_d2.modeling.inference.mask_voting import void_probs_of, voted_class_probs
from ovseg_d2.modeling.inference.sliding_window import SlidingWindow
from ovseg_d2.modeling.meta_arch.open_vocabulary import ClipSegmentor
from ovseg_d2.modeling.proposals import build_mask_proposals
from ovseg_d2.modeling.proposals.generator_copy import GeneratorCopy
from ovseg_d2.modeling.text_classifier import averaged
from ovseg_d2.structures import ImageBatch, MaskProposals, Vocabulary


class PixelSegmentor(ClipSegmentor):
    """Semantic results, from the whole image or from windows, and objects where there is a generator of masks.

    A method adds ``losses`` and ``pixel_logits``.
    """

    def __init__(
        self,
        *,
        sliding_window: SlidingWindow | None,
        proposals: nn.Module | None = None,
        generator_copy: GeneratorCopy | None = None,
        **shared: Any,
    ) -> None:
        """
        Args:
            sliding_window: None: the whole image at once.
            proposals: masks for panoptic and instance results; frozen, and no part of the training.
            generator_copy: the images as the generator gets them; None: as they are loaded.
            shared: see :class:`ClipSegmentor`.

        Raises:
            ValueError: other results than semantic ones are asked for, and there are no masks for them.
        """
        super().__init__(**shared)
        objects = self.inference.tasks - {"semantic"}
        if "mask_accuracy" in objects or (objects and proposals is None):
            raise ValueError(
                f"MODEL.OVSEG.TEST.TASKS is {sorted(self.inference.tasks)}, but {type(self).__name__} classifies "
                "pixels and knows no objects; expected ['semantic'], or with MODEL.OVSEG.TEST.MASK_VOTING any of "
                "semantic, panoptic, instance"
            )
        self.sliding_window = sliding_window
        self.proposals = None if proposals is None else proposals.requires_grad_(False)
        self._generator_copy = generator_copy or GeneratorCopy()

    @staticmethod
    def shared_from_config(
        cfg: CfgNode, *, window_divisibility: int | None = None, **visual_kwargs: Any
    ) -> dict[str, Any]:
        """As in :class:`ClipSegmentor`, with the sliding window and, with ``TEST.MASK_VOTING``, the generator.

        Args:
            window_divisibility: see :meth:`SlidingWindow.from_config`.
        """
        shared = ClipSegmentor.shared_from_config(cfg, **visual_kwargs)
        shared["sliding_window"] = SlidingWindow.from_config(cfg, divisibility=window_divisibility)
        if cfg.MODEL.OVSEG.TEST.MASK_VOTING:
            shared["proposals"] = build_mask_proposals(cfg, shared["clip"])
            shared["generator_copy"] = GeneratorCopy.from_config(cfg, shared["proposals"])
        return shared

    @abstractmethod
    def pixel_logits(self, images: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Normalised images (N, 3, H, W) -> class logits (N, K, h, w) at any resolution."""

    def infer(
        self, images: ImageBatch, batched_inputs: Sequence[dict[str, Any]], vocabulary: Vocabulary
    ) -> list[dict[str, Any]]:
        """As in the base class; objects are voted on by the pixels of semantic results."""
        results = super().infer(images, batched_inputs, vocabulary)
        if self.proposals is not None:
            self._add_objects(results, images, vocabulary)
        return results

    def predict(self, images: ImageBatch, vocabulary: Vocabulary) -> MaskProposals:
        """K masks, of which mask k is class k: ``mask_logits`` are the logits of pixels (N, K, h, w)."""

        def run(windows: Tensor) -> Tensor:
            return self.pixel_logits(windows, vocabulary)

        if self.sliding_window is None:
            return MaskProposals(mask_logits=run(images.tensor))
        divisor = max(self.size_divisibility, 1)
        maps = []
        for image, image_size in zip(images.tensor, images.image_sizes, strict=True):
            # Windows are cut from the image without its padding, as in mmsegmentation; an image with a shorter side
            # keeps as much there as the model needs.
            height, width = (
                side if side >= self.sliding_window.size else -(-side // divisor) * divisor for side in image_size
            )
            logits = self.sliding_window(run, image[None, :, :height, :width])
            maps.append(F.pad(logits, (0, images.padded_size[1] - width, 0, images.padded_size[0] - height)))
        return MaskProposals(mask_logits=torch.cat(maps))

    def results(
        self,
        proposals: MaskProposals,
        images: ImageBatch,
        batched_inputs: Sequence[dict[str, Any]],
        vocabulary: Vocabulary,
        inference: MaskInference,
    ) -> list[dict[str, Any]]:
        """``sem_seg``: class probabilities (K, H, W), a softmax of logits at the size of the results."""
        results = []
        for logits, x, image_size in zip(proposals.mask_logits, batched_inputs, images.image_sizes, strict=True):
            logits = F.interpolate(logits[None].float(), size=images.padded_size, mode="bilinear", align_corners=False)[
                0
            ]
            output_size = (x.get("height", image_size[0]), x.get("width", image_size[1]))
            logits = crop_and_resize(logits, image_size=image_size, output_size=output_size)
            results.append({"sem_seg": logits.softmax(dim=0)})
        return results

    def generator_copy(self, images: ImageBatch) -> ImageBatch:
        return self._generator_copy(images)

    def _add_objects(self, results: Sequence[dict[str, Any]], images: ImageBatch, vocabulary: Vocabulary) -> None:
        """Panoptic and instance results from ``sem_seg``, which stays if it was asked for."""
        frame = self.generator_copy(images)
        proposals = self.propose(self.proposals, frame, averaged(self.text(vocabulary)), vocabulary)
        void_probs = void_probs_of(proposals)
        is_thing = torch.tensor(vocabulary.is_thing)
        for row, result in enumerate(results):
            sem_seg = result["sem_seg"] if "semantic" in self.inference.tasks else result.pop("sem_seg")
            sizes = {
                "padded_size": frame.padded_size,
                "image_size": frame.image_sizes[row],
                "output_size": (sem_seg.shape[-2], sem_seg.shape[-1]),
            }
            mask_logits = proposals.mask_logits[row]
            class_probs = voted_class_probs(
                sem_seg, self.inference.resize(mask_logits.float(), **sizes), void_probs[row]
            )
            for task in sorted(self.inference.tasks - {"semantic"}):
                result.update(self.inference.only(task)(class_probs, mask_logits, is_thing=is_thing, **sizes))
