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
        is_seen: K flags of a zero-shot split, False for classes that training leaves out; empty if there is no split.

    Raises:
        ValueError: an empty or doubled name, or sequences of unequal length.
    """

    names: tuple[str, ...]
    is_thing: tuple[bool, ...]
    synonyms: tuple[tuple[str, ...], ...] = ()
    is_seen: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if not self.synonyms:
            object.__setattr__(self, "synonyms", tuple((name,) for name in self.names))
        if not len(self.names) == len(self.is_thing) == len(self.synonyms):
            raise ValueError(
                f"Vocabulary: {len(self.names)} names, {len(self.is_thing)} thing flags and {len(self.synonyms)} "
                "synonym lists; expected as many of each"
            )
        if self.is_seen and len(self.is_seen) != len(self.names):
            raise ValueError(f"Vocabulary: {len(self.names)} names and {len(self.is_seen)} seen flags")
        known: set[str] = set()
        for index, name in enumerate(self.names):
            if not name.strip():
                raise ValueError(f"Vocabulary: class {index} has an empty name")
            if name in known:
                raise ValueError(f"Vocabulary: class {index} repeats the name {name!r}; names must be distinct")
            known.add(name)
            if not self.synonyms[index] or not all(text.strip() for text in self.synonyms[index]):
                raise ValueError(f"Vocabulary: class {index} ({name!r}) has an empty synonym, or none at all")

    def __len__(self) -> int:
        return len(self.names)

    def seen_in(self, trained: Vocabulary | None) -> tuple[bool, ...]:
        """K flags, whether training knew the class: those of a zero-shot split, else FC-CLIP's rule, a synonym in
        common (to the letter) with the classes ``trained``; where these are not known, every class counts as seen."""
        if self.is_seen:
            return self.is_seen
        if trained is None:
            return (True,) * len(self)
        texts = {text for synonyms in trained.synonyms for text in synonyms}
        return tuple(not texts.isdisjoint(synonyms) for synonyms in self.synonyms)


@dataclass
class TextClasses:
    """A vocabulary as a CLIP text encoder sees it. A class's logit is the largest of its entries' logits.

    Attributes:
        embeds: (E, P, D) float32 unit vectors; E entries (synonyms of all classes, class by class), P prompts each.
        class_ids: (E,) int64 in [0, K), ascending: the class of each entry.
        is_thing: (K,) bool.
        seen: (K,) bool, whether the class (or a synonym of it) was in the training vocabulary.
    """

    embeds: Tensor
    class_ids: Tensor
    is_thing: Tensor
    seen: Tensor

    def __len__(self) -> int:
        return len(self.is_thing)


@dataclass
class ClipFeatures:
    """What a CLIP image encoder gives for N images.

    Attributes:
        image_embeds: (N, D) global embeddings, not normalised; None if the encoder was not asked for them.
        dense: (N, D, h, w) embeddings of the positions, not normalised; None if the encoder was not asked for them.
        layers: intermediate maps (N, C, h', w') by name: ``res2``..``res5`` (ResNet, ConvNeXt; also ``stem``) or
            ``block0``, ``block1``, ... (ViT, patches only).
        tokens: ViT only: (N, 1 + h * w, C) sequence, class token first, that enters the encoder's start block; the
            state from which mask tokens go on. None otherwise.
        grid: (h, w) of the last feature map.
    """

    image_embeds: Tensor | None
    dense: Tensor | None
    layers: dict[str, Tensor]
    tokens: Tensor | None = None
    grid: tuple[int, int] = (0, 0)


@dataclass
class ImageBatch:
    """Normalised images, padded at the right and the bottom with zeros to one size.

    Attributes:
        tensor: (N, 3, H, W) float.
        image_sizes: N pairs (height, width) before padding.
        image_ids: N ids that name the images; they key the random draws of the losses.
        dataset_names: N names of the datasets that they are from, None where an input names none; empty if not known.
        proposal_masks: N tensors (Q_n, H, W) bool, masks that came with the images from a file, padded with False; None
            if none came.
    """

    tensor: Tensor
    image_sizes: list[tuple[int, int]]
    image_ids: list[int | str]
    dataset_names: list[str | None] = field(default_factory=list)
    proposal_masks: list[Tensor] | None = None

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
        text_queries: (N, E, C) what a decoder layer has made of the texts among its queries (MTA-CLIP); None without.
        class_probs: (N, Q, K + 1) scores of an ensemble, whose rows need not add up to one, where they stand in for
            the softmax of ``class_logits``; None otherwise.
        aux: in training the same for earlier decoder layers (deep supervision), first layer first.
    """

    mask_logits: Tensor
    class_logits: Tensor | None = None
    valid: Tensor | None = None
    query_embeds: Tensor | None = None
    text_queries: Tensor | None = None
    class_probs: Tensor | None = None
    aux: list[MaskProposals] = field(default_factory=list)


def pad_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad masks (M, H, W) at the right and the bottom with False to (M, *size) bool."""
    padded = masks.new_zeros((len(masks), *size), dtype=torch.bool)
    padded[:, : masks.shape[1], : masks.shape[2]] = masks
    return padded
