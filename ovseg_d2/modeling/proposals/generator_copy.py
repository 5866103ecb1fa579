"""The generator's own copy of the images, where it wants another size than CLIP (MaskCLIP++, arXiv 2412.11464,
section 4.1: the size that the generator has elsewhere)."""

from __future__ import annotations

from dataclasses import replace

from detectron2.config import CfgNode
from torch import nn

from ovseg_d2.modeling.clip.preprocess import resize_image_batch
from ovseg_d2.modeling.proposals.precomputed import PrecomputedProposals
from ovseg_d2.structures import ImageBatch

RESIZE_MODES = ("none", "short")


class GeneratorCopy:
    """Images as they are loaded -> as the generator gets them."""

    def __init__(self, *, resize: str = "none", input_size: int = 0, size_divisibility: int = 32) -> None:
        """
        Args:
            resize: "none", or "short", the shorter side becomes ``input_size``.
            size_divisibility: height and width of the batch become multiples of it.

        Raises:
            ValueError: another mode, or no size for it.
        """
        if resize not in RESIZE_MODES:
            raise ValueError(f"MODEL.OVSEG.PROPOSALS.RESIZE: {resize!r}; expected one of {', '.join(RESIZE_MODES)}")
        if resize != "none" and input_size <= 0:
            raise ValueError(
                f"MODEL.OVSEG.PROPOSALS.INPUT_SIZE: {input_size}; expected pixels, as RESIZE is {resize!r}"
            )
        self.resize, self.input_size, self.size_divisibility = resize, input_size, size_divisibility

    @classmethod
    def from_config(cls, cfg: CfgNode, generator: nn.Module) -> GeneratorCopy:
        """
        Raises:
            ValueError: see :meth:`__init__`; another size for a generator that looks at no image.
        """
        prop = cfg.MODEL.OVSEG.PROPOSALS
        built = cls(resize=prop.RESIZE, input_size=prop.INPUT_SIZE, size_divisibility=cfg.MODEL.OVSEG.SIZE_DIVISIBILITY)
        if built.resize != "none" and isinstance(generator, PrecomputedProposals):
            raise ValueError(
                f"MODEL.OVSEG.PROPOSALS.RESIZE is {built.resize!r}, but the masks of {prop.NAME} come with the images "
                "as they are loaded; expected 'none'"
            )
        return built

    def __call__(self, images: ImageBatch) -> ImageBatch:
        """The same images, normalised alike, at the generator's size, padded anew; "none" returns them as they are."""
        if self.resize == "none":
            return images
        copy = resize_image_batch(
            images, resize=self.resize, input_size=self.input_size, size_divisibility=self.size_divisibility
        )
        return replace(copy, dataset_names=images.dataset_names)
