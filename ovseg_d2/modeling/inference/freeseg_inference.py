"""FreeSeg's panoptic and instance results (arXiv 2303.17225, section 3.4, and its public code). Pure functions.

A mask is named by its own scores, and counts only where the semantic result agrees with that name. The public code
numbers its classes by mistake in two places: it discards the test class whose index is the number of training classes,
and instances never get the last class. Neither is so here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import Instances
from torch import Tensor

from ovseg_d2.modeling.inference.segments import numbered_segments, scored_instances

#: Class scores of an ensemble are close to each other; this makes them decided ones.
TEMPERATURE = 0.01


@dataclass
class NamedMasks:
    """Q masks with one class each.

    Attributes:
        scores: (Q,) in [0, 1], how clear the class is.
        labels: (Q,) int64 in [0, K).
        masks: (Q, H, W) bool, mask probability of at least a half.
        agreed: (Q, H, W) bool, the part of ``masks`` with that class in the semantic result.
    """

    scores: Tensor
    labels: Tensor
    masks: Tensor
    agreed: Tensor

    def __getitem__(self, chosen: Tensor) -> NamedMasks:
        """Of (Q,) bool or indices."""
        return NamedMasks(self.scores[chosen], self.labels[chosen], self.masks[chosen], self.agreed[chosen])

    def overlap(self) -> Tensor:
        """(Q,) how much of each mask the semantic result agrees with; 0 for empty masks."""
        return self.agreed.sum((1, 2)) / self.masks.sum((1, 2)).clamp(min=1)


def named_masks(class_probs: Tensor, mask_logits: Tensor) -> NamedMasks:
    """
    Args:
        class_probs: (Q, K) scores of an ensemble, without "no object"; rows need not add up to one.
        mask_logits: (Q, H, W).
    """
    mask_probs = mask_logits.sigmoid()
    semantic = torch.einsum("qk,qhw->khw", class_probs, mask_probs).argmax(0)
    scores, labels = (class_probs / TEMPERATURE).softmax(-1).max(-1)
    masks = mask_probs >= 0.5
    return NamedMasks(scores, labels, masks, masks & (semantic == labels[:, None, None]))


def freeseg_panoptic_inference(
    class_probs: Tensor,
    mask_logits: Tensor,
    *,
    is_thing: Tensor,
    object_mask_threshold: float,
    overlap_threshold: float,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Segments of masks that the semantic result agrees with.

    Args:
        class_probs: (Q, K), see :func:`named_masks`.
        mask_logits: (Q, H, W).
        is_thing: (K,) bool.
        object_mask_threshold: things with a smaller score are dropped; 0.5 in the public code.
        overlap_threshold: masks of which a smaller part is agreed with are dropped.

    Returns:
        Segment ids (H, W) int32, 0 where there is none, and for each segment a dict of ``id``, ``isthing``,
        ``category_id`` in [0, K). Segments that later ones cover wholly have no dict: the public code lists them, which
        is no valid panoptic result.
    """
    ids, segments = painted_segments(
        named_masks(class_probs, mask_logits),
        is_thing=is_thing,
        object_mask_threshold=object_mask_threshold,
        overlap_threshold=overlap_threshold,
    )
    visible = set(ids.unique().tolist())
    return ids, [segment for segment in segments if segment["id"] in visible]


def painted_segments(
    named: NamedMasks, *, is_thing: Tensor, object_mask_threshold: float, overlap_threshold: float
) -> tuple[Tensor, list[dict[str, Any]]]:
    """As :func:`freeseg_panoptic_inference`; segments are painted in the masks' order, later ones over earlier ones."""
    things = is_thing.to(named.labels.device)[named.labels]
    accepted = named.agreed.any(dim=2).any(dim=1) & (named.overlap() >= overlap_threshold)
    accepted &= ~things | (named.scores >= object_mask_threshold)
    ids, segments = numbered_segments(named.labels, accepted, is_thing)
    ids, agreed = ids[accepted], named.agreed[accepted]
    if not segments:
        return ids.new_zeros(agreed.shape[1:]), []
    # The last mask at each pixel, counted from 1.
    last = (agreed * torch.arange(1, len(ids) + 1, dtype=torch.int32, device=ids.device)[:, None, None]).amax(0)
    return torch.cat([ids.new_zeros(1), ids])[last], segments


def freeseg_instance_inference(
    class_probs: Tensor,
    mask_logits: Tensor,
    *,
    is_thing: Tensor,
    object_mask_threshold: float,
    overlap_threshold: float,
    duplicate_threshold: float = 0.8,
    boxes_from_masks: bool = True,
) -> Instances:
    """Masks of things that the semantic result agrees with, each with one class.

    Two more faults of the public code are mended: it compares logits instead of probabilities with a half before it
    measures overlaps, and takes the masks of all classes for one class when it looks for groups.

    Args:
        class_probs: (Q, K), see :func:`named_masks`.
        mask_logits: (Q, H, W).
        is_thing: (K,) bool.
        object_mask_threshold, overlap_threshold: masks are kept whose score and agreed part are larger.
        duplicate_threshold: the largest mask of a class is dropped if the others of that class together cover more than
            this part of it: it then stands for a group of objects, or for one of them once more.
        boxes_from_masks: tight boxes; otherwise zeros, as in the public code.

    Returns:
        As :func:`ovseg_d2.modeling.inference.mask_inference.instance_inference`.
    """
    named = named_masks(class_probs, mask_logits)
    keep = is_thing.to(named.labels.device)[named.labels] & (named.overlap() > overlap_threshold)
    rows = (keep & (named.scores > object_mask_threshold)).nonzero()[:, 0]
    rows = rows[~_groups(named.masks[rows], named.labels[rows], duplicate_threshold)]
    return scored_instances(
        mask_logits[rows],
        torch.arange(len(rows), device=rows.device),
        named.scores[rows],
        named.labels[rows],
        boxes_from_masks=boxes_from_masks,
    )


def _groups(masks: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Which of the masks (n, H, W) bool are the largest of their class and covered by its others (n,)."""
    areas = masks.sum((1, 2))
    places = torch.arange(len(masks), device=masks.device)
    same = labels[:, None] == labels
    before = (areas[:, None] < areas) | ((areas[:, None] == areas) & (places[:, None] > places))
    largest = ~(same & before).any(1)
    classes, class_of = labels.unique(return_inverse=True)
    # How many masks of each class lie on a pixel: under the largest one there is another where there are two.
    counts = torch.zeros(len(classes), *masks.shape[1:], dtype=torch.int32, device=masks.device)
    counts.index_add_(0, class_of, masks.int())
    covered = (masks & (counts[class_of] > 1)).sum((1, 2))
    return largest & (covered > threshold * areas)
