"""Targets of one task from panoptic ones, and the task of each iteration."""

from collections import Counter

import pytest
import torch
from detectron2.utils.events import EventStorage

from ovseg_d2.modeling.losses.task_targets import TaskSampler, targets_of_task, task_targets
from ovseg_d2.structures import SegmentationTargets
from tests.helpers import tiny_cfg

IS_THING = torch.tensor([True, False, True, False])


def panoptic_target():
    """Segments of classes 2, 1, 2, 0 and an empty one of 3, each pixel of 5 x 7 in one of them or in none."""
    labels = torch.randint(0, 5, (5, 7), generator=torch.Generator().manual_seed(0))
    masks = torch.stack([labels == i for i in range(4)] + [labels > 9])
    return SegmentationTargets(torch.tensor([2, 1, 2, 0, 3]), masks)


def test_semantic_targets_have_one_mask_a_class():
    target = panoptic_target()
    result = task_targets(target, "semantic", IS_THING)
    assert result.class_ids.tolist() == [0, 1, 2] and result.masks.dtype == torch.bool
    expected = [target.masks[3], target.masks[1], target.masks[0] | target.masks[2]]
    assert torch.equal(result.masks, torch.stack(expected))
    again = task_targets(result, "semantic", IS_THING)
    assert torch.equal(again.masks, result.masks) and torch.equal(again.class_ids, result.class_ids)


def test_overlapping_masks_of_a_class_are_united():
    masks = torch.ones(300, 2, 3, dtype=torch.bool)
    result = task_targets(SegmentationTargets(torch.ones(300, dtype=torch.int64), masks), "semantic", IS_THING)
    assert result.class_ids.tolist() == [1] and result.masks.all()


def test_instance_targets_are_the_things():
    target = panoptic_target()
    result = task_targets(target, "instance", IS_THING)
    assert result.class_ids.tolist() == [2, 2, 0]
    assert torch.equal(result.masks, target.masks[[0, 2, 3]])
    assert len(task_targets(target, "instance", torch.zeros(4, dtype=torch.bool))) == 0


def test_panoptic_targets_stay_as_they_are_and_inputs_are_not_changed():
    target, copy = panoptic_target(), panoptic_target()
    for task in ("semantic", "instance", "panoptic"):
        result = targets_of_task([target, target], task, IS_THING.tolist())
        assert len(result) == 2 and torch.equal(target.masks, copy.masks)
    assert result[0] is target


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_no_segments(task):
    empty = SegmentationTargets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4, 6, dtype=torch.bool))
    result = task_targets(empty, task, IS_THING)
    assert len(result) == 0 and result.masks.shape == (0, 4, 6) and result.masks.dtype == torch.bool


def test_bad_targets():
    with pytest.raises(ValueError, match="task 'depth'; allowed are semantic, instance, panoptic"):
        task_targets(panoptic_target(), "depth", IS_THING)
    with pytest.raises(ValueError, match="class 3, but there are 2 thing flags"):
        task_targets(panoptic_target(), "instance", IS_THING[:2])


ALL = ["semantic", "instance", "panoptic"]


def drawn(sampler, iterations):
    tasks = []
    for iteration in iterations:
        with EventStorage(iteration):
            tasks.append(sampler.draw())
    return tasks


def test_the_draw_depends_on_seed_and_iteration_alone():
    first = drawn(TaskSampler(tasks=ALL, seed=3), range(300))
    assert drawn(TaskSampler(tasks=ALL, seed=3), range(100, 300)) == first[100:]  # another process, or a resumed run
    assert drawn(TaskSampler(tasks=ALL, seed=4), range(300)) != first
    assert set(Counter(first)) == set(ALL) and min(Counter(first).values()) > 70


def test_without_event_storage_calls_are_counted():
    sampler = TaskSampler(tasks=ALL, seed=3)
    assert [sampler.draw() for _ in range(20)] == drawn(TaskSampler(tasks=ALL, seed=3), range(20))


@pytest.mark.parametrize("tasks", [[], ["semantic", "depth"], ["semantic", "semantic"]])
def test_bad_tasks(tasks):
    with pytest.raises(ValueError, match="FROZEN_CLIP.TRAIN_TASKS.*allowed"):
        TaskSampler(tasks=tasks)


def test_tasks_must_fit_the_mapper():
    cfg = tiny_cfg()
    cfg.MODEL.OVSEG.FROZEN_CLIP.TRAIN_TASKS = ALL
    assert TaskSampler.from_config(cfg).tasks == tuple(ALL)
    cfg.INPUT.TARGETS = "semantic"
    with pytest.raises(ValueError, match="TRAIN_TASKS is .* INPUT.TARGETS is 'semantic'"):
        TaskSampler.from_config(cfg)
    cfg.MODEL.OVSEG.FROZEN_CLIP.TRAIN_TASKS = ["semantic"]
    assert TaskSampler.from_config(cfg).draw() == "semantic"
