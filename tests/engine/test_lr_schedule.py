"""Schedules equal their formulas, and go on exactly after a resume."""

import math

import pytest
import torch

from ovseg_d2.engine.lr_schedule import build_lr_scheduler
from tests.helpers import tiny_cfg

MAX_ITER, WARMUP = 20, 5


def make(name, warmup_iters=WARMUP, end=0.0):
    cfg = tiny_cfg()
    solver = cfg.SOLVER
    solver.LR_SCHEDULER_NAME, solver.MAX_ITER, solver.BASE_LR = name, MAX_ITER, 2.0
    solver.STEPS, solver.GAMMA, solver.BASE_LR_END = (10, 16), 0.1, end
    solver.WARMUP_ITERS, solver.WARMUP_FACTOR, solver.WARMUP_METHOD = warmup_iters, 0.1, "linear"
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": 2.0}, {"params": parameters[1:], "lr": 0.2}], lr=2.0)
    return optimizer, build_lr_scheduler(cfg, optimizer)


def rates(optimizer, scheduler, steps):
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return found


def expected(name, i):
    warmup = 0.1 * (1 - i / WARMUP) + i / WARMUP
    if name == "WarmupPolyLR":
        return (1 - i / MAX_ITER) ** 0.9 * (warmup if i < WARMUP else 1)
    if name == "WarmupMultiStepLR":
        return warmup if i < WARMUP else 0.1 ** sum(i >= step for step in (10, 16))
    cosine = 0.5 * (1 + math.cos(math.pi * i / MAX_ITER))
    # detectron2's warm-up is a line up to the schedule's value at its end.
    end = 0.5 * (1 + math.cos(math.pi * WARMUP / MAX_ITER))
    return 0.1 * (1 - i / WARMUP) + end * i / WARMUP if i < WARMUP else cosine


@pytest.mark.parametrize("name", ["WarmupPolyLR", "WarmupMultiStepLR", "WarmupCosineLR"])
def test_formula_and_resume(name):
    whole = rates(*make(name), MAX_ITER)
    for i, (first, second) in enumerate(whole):
        assert first == pytest.approx(2.0 * expected(name, i), abs=1e-6), i
        assert second == pytest.approx(first / 10)

    optimizer, scheduler = make(name)
    rates(optimizer, scheduler, 7)
    saved = optimizer.state_dict(), scheduler.state_dict()
    optimizer, scheduler = make(name)
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert rates(optimizer, scheduler, MAX_ITER - 7) == whole[7:]


def test_poly_without_warmup_starts_at_the_base_rate():
    assert rates(*make("WarmupPolyLR", warmup_iters=0), 1)[0][0] == 2.0


def test_cosine_ends_where_it_should():
    """MaskCLIP++: from 2e-4 to 1e-5; a group with a factor keeps it to the end."""
    found = rates(*make("WarmupCosineLR", warmup_iters=0, end=0.1), MAX_ITER + 1)
    for i, (first, second) in enumerate(found):
        assert first == pytest.approx(0.1 + 1.9 * 0.5 * (1 + math.cos(math.pi * i / MAX_ITER))), i
        assert second == pytest.approx(first / 10)
    assert found[-1] == pytest.approx([0.1, 0.01])


def test_poly_ends_where_it_should():
    """ZegCLIP: from 2e-4 to 1e-6; the warm-up is a share of that."""
    found = rates(*make("WarmupPolyLR", end=0.1), MAX_ITER + 1)
    for i, (first, second) in enumerate(found):
        warmup = 0.1 + 0.9 * i / WARMUP if i < WARMUP else 1
        assert first == pytest.approx(warmup * (0.1 + 1.9 * (1 - i / MAX_ITER) ** 0.9)), i
        assert second == pytest.approx(first / 10)
    assert found[-1] == pytest.approx([0.1, 0.01])


@pytest.mark.parametrize("name", ["WarmupCosineLR", "WarmupPolyLR"])
@pytest.mark.parametrize("end", [-0.1, 2.5])
def test_a_schedule_that_would_rise(name, end):
    with pytest.raises(ValueError, match=f"SOLVER.BASE_LR_END is {end}; expected 0 to SOLVER.BASE_LR, 2.0"):
        make(name, end=end)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="SOLVER.LR_SCHEDULER_NAME is 'StepLR', allowed are WarmupPolyLR"):
        make("StepLR")
