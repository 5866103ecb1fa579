"""Learning rate schedules: functions of the iteration alone, so that a resumed run goes on exactly."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from detectron2.solver.lr_scheduler import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler, ParamScheduler

LR_SCHEDULERS = ("WarmupPolyLR", "WarmupMultiStepLR", "WarmupCosineLR")


class WarmupPolySchedule(ParamScheduler):
    """Factor ``warmup(i) * ((1 - end) * (1 - i / max_iter) ** power + end)`` at iteration i (DeepLab; ``end`` 0 in the
    public Mask2Former on ADE20K, above 0 in the public ZegCLIP).

    Unlike detectron2's warm-up, a line up to the schedule's value at its end, this one multiplies the schedule.
    """

    def __init__(
        self,
        *,
        max_iter: int,
        power: float,
        constant_ending: float,
        end: float = 0.0,
        warmup_factor: float,
        warmup_iters: int,
        warmup_method: str,
    ) -> None:
        """
        Args:
            max_iter: length of the training.
            power: of the polynomial.
            constant_ending: the factor does not fall below this after the warm-up.
            end: the factor that it ends with.
            warmup_factor: factor of the first iteration, if there is a warm-up.
            warmup_iters: length of the warm-up.
            warmup_method: ``linear`` or ``constant``.
        """
        if warmup_method not in ("linear", "constant"):
            raise ValueError(f"SOLVER.WARMUP_METHOD is {warmup_method!r}, allowed are linear, constant")
        self.max_iter = max_iter
        self.power = power
        self.constant_ending = constant_ending
        self.end = end
        self.warmup_factor = warmup_factor
        self.warmup_iters = warmup_iters
        self.warmup_method = warmup_method

    def __call__(self, where: float) -> float:
        """The factor at ``where`` = iteration / max_iter, in [0, 1]."""
        iteration = round(where * self.max_iter)
        # One step past the end is asked for when the last iteration is done.
        poly = (1.0 - self.end) * max(0.0, 1.0 - iteration / self.max_iter) ** self.power + self.end
        if iteration >= self.warmup_iters:
            return max(poly, self.constant_ending)
        if self.warmup_method == "constant":
            return self.warmup_factor * poly
        done = iteration / self.warmup_iters
        return (self.warmup_factor * (1.0 - done) + done) * poly


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """``SOLVER.LR_SCHEDULER_NAME``: detectron2's own schedules, and ``WarmupPolyLR``.

    ``WarmupCosineLR`` and ``WarmupPolyLR`` end at ``SOLVER.BASE_LR_END``, which old versions of detectron2 lack. Every
    group of parameters gets the same factors, so that those with a factor of their own end lower, or higher (the public
    MaskCLIP++, too).

    Raises:
        ValueError: no such schedule, or an end that is not between 0 and ``SOLVER.BASE_LR``.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME not in LR_SCHEDULERS:
        raise ValueError(
            f"SOLVER.LR_SCHEDULER_NAME is {solver.LR_SCHEDULER_NAME!r}, allowed are {', '.join(LR_SCHEDULERS)}"
        )
    if solver.LR_SCHEDULER_NAME in ("WarmupCosineLR", "WarmupPolyLR"):
        if not 0 <= solver.BASE_LR_END <= solver.BASE_LR:
            raise ValueError(
                f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}; expected 0 to SOLVER.BASE_LR, {solver.BASE_LR}"
            )
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        cosine = WarmupParamScheduler(
            CosineParamScheduler(1.0, solver.BASE_LR_END / solver.BASE_LR),
            solver.WARMUP_FACTOR,
            min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
            solver.WARMUP_METHOD,
        )
        return LRMultiplier(optimizer, multiplier=cosine, max_iter=solver.MAX_ITER)
    if solver.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return build_detectron2_lr_scheduler(cfg, optimizer)
    schedule = WarmupPolySchedule(
        max_iter=solver.MAX_ITER,
        power=solver.POLY_LR_POWER,
        constant_ending=solver.POLY_LR_CONSTANT_ENDING,
        end=solver.BASE_LR_END / solver.BASE_LR,
        warmup_factor=solver.WARMUP_FACTOR,
        warmup_iters=solver.WARMUP_ITERS,
        warmup_method=solver.WARMUP_METHOD,
    )
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=solver.MAX_ITER)
