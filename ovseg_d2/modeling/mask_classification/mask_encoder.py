"""The proposals of a generator, as CLIP sees them: as crops of the image, or on CLIP's own copy of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD, ClipImageEncoder
from ovseg_d2.modeling.clip.image_prompts import MaskPrompts
from ovseg_d2.modeling.clip.preprocess import RESIZE_MODES, resize_image_batch, resize_masks
from ovseg_d2.modeling.mask_classification.crops import CropEncoder
from ovseg_d2.structures import ImageBatch, MaskProposals

#: As in :mod:`ovseg_d2.modeling.clip.preprocess`, and MAFT's: the padded batch is squeezed into a square, whole.
PADDED_SQUARE = "padded_square"


class MaskEncoder(nn.Module):
    """Images normalised for a generator, and its masks -> CLIP's embeddings of the masks; without parameters."""

    def __init__(
        self,
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        resize: str = "none",
        input_size: int = 0,
        align_corners: bool = False,
        crops: CropEncoder | None = None,
    ) -> None:
        """
        Args:
            pixel_mean, pixel_std: of the images that come in, on the scale 0 to 255.
            resize, input_size: CLIP's copy of the image, see :func:`resized_size`; "padded_square" squeezes the padded
                batch into a square. Crops come from the image as it is.
            align_corners: of the bilinear resizing of mask logits to the padded images.
            crops: every mask is a picture of its own; None: one pass over the image, embeddings of masks.

        Raises:
            ValueError: an unknown ``resize``, or one that needs an ``input_size``; not with crops, which need neither.
        """
        super().__init__()
        if crops is None:
            allowed = (*RESIZE_MODES, PADDED_SQUARE)
            if resize not in allowed:
                raise ValueError(f"MODEL.OVSEG.CLIP.RESIZE: {resize!r}; expected one of {', '.join(allowed)}")
            if resize != "none" and input_size <= 0:
                raise ValueError(f"MODEL.OVSEG.CLIP.INPUT_SIZE: {input_size}; expected pixels, as RESIZE is {resize!r}")
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (CLIP_PIXEL_MEAN, CLIP_PIXEL_STD))
        pixel_mean, pixel_std = (torch.tensor(values).view(-1, 1, 1) for values in (pixel_mean, pixel_std))
        self.register_buffer("scale", pixel_std / std, persistent=False)
        self.register_buffer("shift", (pixel_mean - mean) / std, persistent=False)
        self.resize, self.input_size, self.align_corners = resize, input_size, align_corners
        self.crops = crops

    @classmethod
    def from_config(cls, cfg: CfgNode, *, crops: bool) -> MaskEncoder:
        """
        Raises:
            ValueError: images are not RGB.
        """
        if cfg.INPUT.FORMAT != "RGB":
            raise ValueError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; CLIP expects RGB")
        return cls(
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
            resize=cfg.MODEL.OVSEG.CLIP.RESIZE,
            input_size=cfg.MODEL.OVSEG.CLIP.INPUT_SIZE,
            align_corners=cfg.MODEL.OVSEG.PROPOSALS.ALIGN_CORNERS,
            crops=CropEncoder.from_config(cfg) if crops else None,
        )

    def forward(
        self,
        visual: ClipImageEncoder,
        images: ImageBatch,
        proposals: MaskProposals,
        *,
        mask_prompts: MaskPrompts | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            mask_prompts: for what a mask leaves out of a crop.

        Returns:
            Embeddings (N, Q, D), not normalised, and which rows are valid, (N, Q) bool; None if all are. For crops a
            mask without a pixel is not valid.
        """
        if self.crops is not None:
            masks = self.resized(proposals.mask_logits, images)
            copy = self.normalised(images)
            return self.crops(visual, copy, replace(proposals, mask_logits=masks), mask_prompts=mask_prompts)
        copy = self.clip_copy(images, divisor=divisor_of(visual))
        features = visual(copy.tensor, masks_only=True)
        mask_probs = self.resized(proposals.mask_logits, images).sigmoid()
        return visual.encode_masks(features, self.to_frame(mask_probs, images, copy)), proposals.valid

    def resized(self, mask_logits: Tensor, images: ImageBatch) -> Tensor:
        """Mask logits (N, Q, h, w) at the size of the padded images, (N, Q, H, W) float32."""
        if tuple(mask_logits.shape[-2:]) == images.padded_size:
            return mask_logits.float()
        return F.interpolate(
            mask_logits.float(), size=images.padded_size, mode="bilinear", align_corners=self.align_corners
        )

    def clip_copy(self, images: ImageBatch, *, resize: str | None = None, divisor: int = 32) -> ImageBatch:
        """The images as CLIP wants them: its normalisation, its size, a multiple of ``divisor`` pixels.

        Args:
            resize: another mode than the encoder's own.
        """
        resize = resize or self.resize
        normalised = self.normalised(images)
        if resize != PADDED_SQUARE:
            return resize_image_batch(normalised, resize=resize, input_size=self.input_size, size_divisibility=divisor)
        size = (self.input_size, self.input_size)
        return replace(
            images,
            tensor=F.interpolate(normalised.tensor, size=size, mode="bilinear", align_corners=False),
            image_sizes=[size] * len(images),
        )

    def normalised(self, images: ImageBatch) -> ImageBatch:
        """The same batch with CLIP's normalisation, zeros in its padding."""
        tensor = torch.zeros_like(images.tensor)
        for row, image, (height, width) in zip(tensor, images.tensor, images.image_sizes, strict=True):
            row[:, :height, :width] = image[:, :height, :width] * self.scale + self.shift
        return replace(images, tensor=tensor)

    def to_frame(self, maps: Tensor, source: ImageBatch, target: ImageBatch) -> Tensor:
        """Maps (N, C, H, W) on the padded images ``source``, on the same images as ``target`` has them.

        With "padded_square" both frames are the same but for their size, which the encoders do not mind.
        """
        same_sizes = source.image_sizes == target.image_sizes and source.padded_size == target.padded_size
        if same_sizes or self.resize == PADDED_SQUARE:
            return maps
        moved = [
            resize_masks(one[:, :h, :w], size, target.padded_size)
            for one, (h, w), size in zip(maps, source.image_sizes, target.image_sizes, strict=True)
        ]
        return torch.stack(moved)


def divisor_of(visual: ClipImageEncoder) -> int:
    """What a side of an image should be a multiple of: no more padding than whole patches need, as a transformer
    attends to it."""
    return getattr(visual, "patch_size", 32)
