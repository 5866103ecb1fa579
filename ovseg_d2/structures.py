"""What passes between the parts of a model (shapes in the glossary's letters).

Glossary, used in docstrings and einsum strings alike:

    N images   Q proposals or queries   K classes   E vocabulary entries (synonyms)   P points, or prompts a class
    M ground-truth segments of one image   C channels   D CLIP joint dimension   L tokens   H W image   h w feature map

``*_logits`` are before, ``*_probs`` after a softmax or sigmoid.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Vocabulary:
    """K class names with synonyms and the thing/stuff distinction; hashable, so that it can key a cache.

    Args:
        names: K distinct, non-empty display names.
        is_thing: K flags, True for countable objects (instances), False for stuff.
        synonyms: for each class the texts that stand for it; its name alone by default.

    Raises:
        ValueError: an empty or doubled name, or sequences of unequal length.
    """

    names: tuple[str, ...]
    is_thing: tuple[bool, ...]
    synonyms: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.synonyms:
            object.__setattr__(self, "synonyms", tuple((name,) for name in self.names))
        if not len(self.names) == len(self.is_thing) == len(self.synonyms):
            raise ValueError(
                f"Vocabulary: {len(self.names)} names, {len(self.is_thing)} thing flags and {len(self.synonyms)} "
                "synonym lists; expected as many of each"
            )
        seen: set[str] = set()
        for index, name in enumerate(self.names):
            if not name.strip():
                raise ValueError(f"Vocabulary: class {index} has an empty name")
            if name in seen:
                raise ValueError(f"Vocabulary: class {index} repeats the name {name!r}; names must be distinct")
            seen.add(name)

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class ImageBatch:
    """Normalised images, padded at the right and the bottom with zeros to one size.

    Attributes:
        tensor: (N, 3, H, W) float.
        image_sizes: N pairs (height, width) before padding.
        image_ids: N ids that name the images; they key the random draws of the losses.
    """

    tensor: Tensor
    image_sizes: list[tuple[int, int]]
    image_ids: list[int | str]

    def __len__(self) -> int:
        return len(self.image_sizes)

    @property
    def padded_size(self) -> tuple[int, int]:
        return self.tensor.shape[-2], self.tensor.shape[-1]


@dataclass
class SegmentationTargets:
    """Ground truth of one image.

    Attributes:
        class_ids: (M,) int64 in [0, K).
        masks: (M, H, W) bool, already padded to the batch's size.
    """

    class_ids: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.class_ids)


@dataclass
class MaskProposals:
    """Q masks an image, from whichever generator.

    Attributes:
        mask_logits: (N, Q, h, w).
        class_logits: (N, Q, K + 1), the last column for "no object"; None for class-agnostic generators.
        valid: (N, Q) bool, False where a row only fills the batch; None when all are real.
        query_embeds: (N, Q, C) the decoder's queries; None for generators without.
        aux: the same for earlier decoder layers (deep supervision), first layer first.
    """

    mask_logits: Tensor
    class_logits: Tensor | None = None
    valid: Tensor | None = None
    query_embeds: Tensor | None = None
    aux: list[MaskProposals] = field(default_factory=list)


def pad_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad masks (M, H, W) at the right and the bottom with False to (M, *size) bool."""
    padded = masks.new_zeros((len(masks), *size), dtype=torch.bool)
    padded[:, : masks.shape[1], : masks.shape[2]] = masks
    return padded
