"""FreeSeg's training on several tasks by one model (arXiv 2303.17225, section 3.2): each iteration has one task."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ovseg_d2.modeling.layers.step_counter import StepCounter
from ovseg_d2.structures import SegmentationTargets

TASKS = ("semantic", "instance", "panoptic")


def task_targets(target: SegmentationTargets, task: str, is_thing: Tensor) -> SegmentationTargets:
    """An image's panoptic ground truth as that of one task, as a mapper with ``INPUT.TARGETS`` of that name gives it.

    Crowds are no panoptic segments, so semantic targets lack them here.

    Args:
        target: a mask a segment, (M, H, W) bool.
        task: ``semantic``: the masks of a class are one, classes in ascending order; ``instance``: things only;
            ``panoptic``: the target itself. The first two have no empty masks.
        is_thing: (K,) bool.

    Raises:
        ValueError: another task, or a class that ``is_thing`` does not have.
    """
    if task not in TASKS:
        raise ValueError(f"no targets for the task {task!r}; allowed are {', '.join(TASKS)}")
    if task == "panoptic":
        return target
    class_ids, masks = target.class_ids, target.masks
    if task == "semantic":
        class_ids, class_of = class_ids.unique(return_inverse=True)
        # The sum of bools is their union.
        masks = masks.new_zeros((len(class_ids), *masks.shape[1:])).index_add_(0, class_of, masks)
        chosen = masks.flatten(1).any(1)
    else:
        if len(class_ids) and int(class_ids.max()) >= len(is_thing):
            raise ValueError(f"a target has class {int(class_ids.max())}, but there are {len(is_thing)} thing flags")
        chosen = is_thing.to(class_ids.device)[class_ids] & masks.flatten(1).any(1)
    return SegmentationTargets(class_ids[chosen], masks[chosen])


class TaskSampler:
    """Draws the task of each iteration, keyed by (seed, iteration): the same in all processes, and after a resume."""

    def __init__(self, *, tasks: Sequence[str] = ("semantic",), seed: int = 0) -> None:
        """
        Args:
            tasks: what is drawn from, with equal chances.

        Raises:
            ValueError: a task that does not exist or stands twice, or none.
        """
        if not tasks or set(tasks) - set(TASKS) or len(set(tasks)) < len(tasks):
            raise ValueError(
                f"MODEL.OVSEG.FROZEN_CLIP.TRAIN_TASKS: got {list(tasks)}; allowed are one or more of "
                f"{', '.join(TASKS)}, each once"
            )
        self.tasks = tuple(tasks)
        self.seed = seed
        self.step = StepCounter()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> TaskSampler:
        """
        Raises:
            ValueError: other tasks than that of ``INPUT.TARGETS``, and these are not panoptic.
        """
        tasks = cfg.MODEL.OVSEG.FROZEN_CLIP.TRAIN_TASKS
        sampler = cls(tasks=tasks, seed=max(cfg.SEED, 0))
        if cfg.INPUT.TARGETS != "panoptic" and sampler.tasks != (cfg.INPUT.TARGETS,):
            raise ValueError(
                f"MODEL.OVSEG.FROZEN_CLIP.TRAIN_TASKS is {list(tasks)}, but INPUT.TARGETS is {cfg.INPUT.TARGETS!r}; "
                f"expected INPUT.TARGETS panoptic, or the task {cfg.INPUT.TARGETS} alone"
            )
        return sampler

    def draw(self) -> str:
        """The task of this iteration; to be called once in it."""
        return random.Random(f"{self.seed}/{self.step()}").choice(self.tasks)


def targets_of_task(
    targets: Sequence[SegmentationTargets], task: str, is_thing: Sequence[bool]
) -> list[SegmentationTargets]:
    """:func:`task_targets` of a batch's images."""
    flags = torch.tensor(is_thing, dtype=torch.bool)
    return [task_targets(target, task, flags) for target in targets]
