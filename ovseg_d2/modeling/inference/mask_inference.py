"""Class probabilities and mask logits of one image to semantic, panoptic and instance results. Pure functions.

Mask2Former, arXiv 2112.01527, and MaskFormer, arXiv 2107.06278, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F

from ovseg_d2.modeling.inference.freeseg_inference import freeseg_instance_inference, freeseg_panoptic_inference
from ovseg_d2.modeling.inference.segments import numbered_segments, scored_instances


def crop_and_resize(maps: Tensor, *, image_size: tuple[int, int], output_size: tuple[int, int]) -> Tensor:
    """Maps (C, H, W) of a padded image, cropped to the image (top left) and resized to (C, *output_size)."""
    maps = maps[:, : image_size[0], : image_size[1]]
    if image_size == output_size:
        return maps
    return F.interpolate(maps[None], size=output_size, mode="bilinear", align_corners=False)[0]


def semantic_inference(class_probs: Tensor, mask_logits: Tensor) -> Tensor:
    """Class scores of every pixel: the sum over queries of class probability times mask probability.

    Args:
        class_probs: (Q, K + 1), the last column for "no object".
        mask_logits: (Q, H, W).

    Returns:
        (K, H, W), not normalised.
    """
    return torch.einsum("qk,qhw->khw", class_probs[:, :-1], mask_logits.sigmoid())


def panoptic_inference(
    class_probs: Tensor,
    mask_logits: Tensor,
    *,
    is_thing: Tensor,
    object_mask_threshold: float,
    overlap_threshold: float,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Non-overlapping segments: each pixel goes to the query with the largest score times mask probability.

    Args:
        class_probs: (Q, K + 1), the last column for "no object".
        mask_logits: (Q, H, W).
        is_thing: (K,) bool.
        object_mask_threshold: queries whose class probability does not exceed it are dropped.
        overlap_threshold: segments that keep a smaller part of their own mask are dropped.

    Returns:
        Segment ids (H, W) int32, 0 where there is none, and for each segment a dict of ``id`` (from 1), ``isthing``,
        ``category_id`` in [0, K). Queries of one stuff class share a segment.
    """
    num_classes = class_probs.shape[-1] - 1
    scores, labels = class_probs.max(-1)
    keep = (labels != num_classes) & (scores > object_mask_threshold)
    scores, labels, mask_probs = scores[keep], labels[keep], mask_logits[keep].sigmoid()
    num_kept, h, w = mask_probs.shape
    if num_kept == 0:
        return mask_logits.new_zeros((h, w), dtype=torch.int32), []

    owner = (scores[:, None, None] * mask_probs).argmax(0)
    inside = mask_probs.gather(0, owner[None])[0] >= 0.5
    owned_area = torch.bincount(owner.flatten(), minlength=num_kept)
    final_area = torch.bincount(owner[inside], minlength=num_kept)
    mask_area = (mask_probs >= 0.5).sum((1, 2))
    accepted = (owned_area > 0) & (mask_area > 0) & (final_area > 0)
    accepted &= owned_area / mask_area.clamp(min=1) >= overlap_threshold

    id_of_query, segments = numbered_segments(labels, accepted, is_thing)
    return torch.where(inside, id_of_query[owner], 0), segments


def instance_inference(
    class_probs: Tensor, mask_logits: Tensor, *, is_thing: Tensor, top_k: int, boxes_from_masks: bool = True
) -> Instances:
    """The best pairs of query and class; a query can appear with several classes.

    Args:
        class_probs: (Q, K + 1), the last column for "no object".
        mask_logits: (Q, H, W).
        is_thing: (K,) bool; pairs with stuff classes count among the ``top_k`` and are dropped.
        top_k: pairs considered.
        boxes_from_masks: tight boxes; otherwise zeros, as the public implementation returns.

    Returns:
        ``pred_masks`` (n, H, W) bool, ``scores`` (n,) class probability times mean mask probability inside the mask,
        falling, ``pred_classes`` (n,) in [0, K), ``pred_boxes``.
    """
    num_classes = class_probs.shape[-1] - 1
    pair_probs = class_probs[:, :-1].flatten()
    scores, pairs = pair_probs.topk(min(top_k, len(pair_probs)))
    labels = pairs % num_classes
    things = is_thing.to(labels.device)[labels]
    scores, labels = scores[things], labels[things]
    # A query in several pairs is measured once.
    queries, rows = torch.unique(pairs[things] // num_classes, return_inverse=True)
    return scored_instances(mask_logits[queries], rows, scores, labels, boxes_from_masks=boxes_from_masks)


class MaskInference:
    """The chosen tasks' results of one image, in detectron2's form.

    Mask logits are resized to the output before the results are formed; in semantic-only runs the class scores are
    resized afterwards instead, unless ``postprocess_before_inference`` is set. The public implementation does so, and
    the two orders differ slightly.
    """

    TASKS = ("semantic", "panoptic", "instance")
    #: Tasks without a result here: the classes of masks that came with the images, which the model gives itself.
    MEASURES = ("mask_accuracy",)
    MERGES = ("mask2former", "freeseg")

    def __init__(
        self,
        *,
        tasks: Sequence[str],
        object_mask_threshold: float,
        overlap_threshold: float,
        postprocess_before_inference: bool,
        top_k: int,
        boxes_from_masks: bool,
        align_corners: bool = False,
        resize_probs: bool = False,
        merge: str = "mask2former",
        return_masks: bool = False,
    ) -> None:
        """See the functions above.

        Args:
            align_corners: of the bilinear resizing of mask logits to the padded image.
            resize_probs: from there to the output, mask probabilities are resized instead of logits (MaskCLIP++).
            merge: how masks become panoptic and instance results: "mask2former", by the functions above, or "freeseg".
            return_masks: the masks that semantic results are made of are a result, too.

        Raises:
            ValueError: a task or merge that does not exist, or no task.
        """
        allowed = self.TASKS + self.MEASURES
        if not tasks or set(tasks) - set(allowed):
            raise ValueError(f"MODEL.OVSEG.TEST.TASKS: got {list(tasks)}; allowed are one or more of {allowed}")
        if merge not in self.MERGES:
            raise ValueError(f"MODEL.OVSEG.TEST.MERGE is {merge!r}; allowed are {', '.join(self.MERGES)}")
        self.tasks = frozenset(tasks)
        self.object_mask_threshold, self.overlap_threshold = object_mask_threshold, overlap_threshold
        self.postprocess_before_inference = postprocess_before_inference
        self.resize_first = self._resizes_first()
        self.top_k, self.boxes_from_masks = top_k, boxes_from_masks
        self.align_corners = align_corners
        self.resize_probs = resize_probs
        self.merge = merge
        self.return_masks = return_masks

    @classmethod
    def from_config(cls, cfg: CfgNode, *, resize_probs: bool = False) -> MaskInference:
        """
        Args:
            resize_probs: see the constructor.
        """
        test = cfg.MODEL.OVSEG.TEST
        return cls(
            tasks=test.TASKS,
            object_mask_threshold=test.OBJECT_MASK_THRESHOLD,
            overlap_threshold=test.OVERLAP_THRESHOLD,
            postprocess_before_inference=test.POSTPROCESS_BEFORE_INFERENCE,
            top_k=cfg.TEST.DETECTIONS_PER_IMAGE,
            boxes_from_masks=test.BOXES_FROM_MASKS,
            align_corners=cfg.MODEL.OVSEG.PROPOSALS.ALIGN_CORNERS,
            resize_probs=resize_probs,
            merge=test.MERGE,
            return_masks=bool(test.ORACLE),
        )

    def only(self, task: str) -> MaskInference:
        """The same for one of the tasks, as it is beside the others."""
        one = copy(self)
        one.tasks = frozenset({task})
        return one

    def restricted(self, tasks: Sequence[str]) -> MaskInference:
        """As if no other than ``tasks`` had been chosen."""
        fewer = copy(self)
        fewer.tasks = self.tasks & set(tasks)
        fewer.resize_first = fewer._resizes_first()
        return fewer

    def _resizes_first(self) -> bool:
        return self.postprocess_before_inference or not self.tasks.isdisjoint({"panoptic", "instance"})

    def resize(
        self,
        mask_logits: Tensor,
        *,
        padded_size: tuple[int, int],
        image_size: tuple[int, int],
        output_size: tuple[int, int],
    ) -> Tensor:
        """Mask logits (Q, h, w) at the size that the results are formed at: the output's or the padded image's."""
        if tuple(mask_logits.shape[-2:]) != tuple(padded_size):
            mask_logits = F.interpolate(
                mask_logits[None], size=padded_size, mode="bilinear", align_corners=self.align_corners
            )[0]
        if not self.resize_first:
            return mask_logits
        sizes = {"image_size": image_size, "output_size": output_size}
        if self.resize_probs:
            return crop_and_resize(mask_logits.sigmoid(), **sizes).logit(eps=1e-6)
        return crop_and_resize(mask_logits, **sizes)

    def __call__(
        self,
        class_probs: Tensor,
        mask_logits: Tensor,
        *,
        is_thing: Tensor,
        padded_size: tuple[int, int],
        image_size: tuple[int, int],
        output_size: tuple[int, int],
    ) -> dict[str, Any]:
        """
        Args:
            class_probs: (Q, K + 1), the last column for "no object"; rows need not add up to one.
            mask_logits: (Q, h, w) of the padded image.
            is_thing: (K,) bool.
            padded_size, image_size, output_size: (height, width) of the network's input with and without padding, and
                of the results.

        Returns:
            ``sem_seg`` (K, H, W), ``panoptic_seg`` (ids (H, W), segments), ``instances``: those of the tasks; with
            ``return_masks`` beside ``sem_seg`` the ``mask_probs`` (Q, H, W), whose sum, weighted by class, it is.
        """
        if self.tasks.isdisjoint(self.TASKS):
            return {}
        sizes = {"image_size": image_size, "output_size": output_size}
        class_probs = class_probs.float()
        mask_logits = self.resize(mask_logits.float(), padded_size=padded_size, **sizes)
        result: dict[str, Any] = {}
        if "semantic" in self.tasks:
            sem_seg = semantic_inference(class_probs, mask_logits)
            result["sem_seg"] = sem_seg if self.resize_first else crop_and_resize(sem_seg, **sizes)
            if self.return_masks:
                mask_probs = mask_logits.sigmoid()
                result["mask_probs"] = mask_probs if self.resize_first else crop_and_resize(mask_probs, **sizes)
        if "panoptic" in self.tasks:
            result["panoptic_seg"] = self._panoptic(class_probs, mask_logits, is_thing)
        if "instance" in self.tasks:
            result["instances"] = self._instances(class_probs, mask_logits, is_thing)
        return result

    def _panoptic(
        self, class_probs: Tensor, mask_logits: Tensor, is_thing: Tensor
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        thresholds = {
            "object_mask_threshold": self.object_mask_threshold,
            "overlap_threshold": self.overlap_threshold,
        }
        if self.merge == "freeseg":
            return freeseg_panoptic_inference(class_probs[:, :-1], mask_logits, is_thing=is_thing, **thresholds)
        return panoptic_inference(class_probs, mask_logits, is_thing=is_thing, **thresholds)

    def _instances(self, class_probs: Tensor, mask_logits: Tensor, is_thing: Tensor) -> Instances:
        if self.merge == "freeseg":
            return freeseg_instance_inference(
                class_probs[:, :-1],
                mask_logits,
                is_thing=is_thing,
                object_mask_threshold=self.object_mask_threshold,
                overlap_threshold=self.overlap_threshold,
                boxes_from_masks=self.boxes_from_masks,
            )
        return instance_inference(
            class_probs,
            mask_logits,
            is_thing=is_thing,
            top_k=self.top_k,
            boxes_from_masks=self.boxes_from_masks,
        )
