"""The training loop: detectron2's hooks around a step that runs on any device and in any number of processes."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventStorage, JSONWriter, TensorboardXWriter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ovseg_d2.checkpoint.checkpointer import Checkpointer
from ovseg_d2.data import build_train_loader
from ovseg_d2.engine.evaluate import Results, evaluate
from ovseg_d2.engine.loading import load_parts
from ovseg_d2.engine.lr_schedule import build_lr_scheduler
from ovseg_d2.engine.optimizer import build_gradient_clipper, build_optimizer
from ovseg_d2.engine.setup import seed_everything

logger = logging.getLogger(__name__)


class NonFiniteLossError(ValueError):
    """A loss is NaN or infinite."""


class TrainingClock(HookBase):
    """Seconds spent in training, over all resumed parts of a run; checkpoints carry them."""

    def __init__(self) -> None:
        self._before = 0.0
        self._start: float | None = None

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._start if self._start is not None else 0.0)

    def before_train(self) -> None:
        self._start = time.perf_counter()

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._before = state["seconds"]


class Trainer(TrainerBase):
    """Trains the model of a config, evaluates it now and then and at the end, and can go on where it stopped.

    Autocast is bfloat16 or float16 on CUDA (the latter with a gradient scaler) and bfloat16 on CPU.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: a config from ``engine.setup``, which also prepares logs and seeds.

        Raises:
            ValueError: a key has a value that does not fit the model, the device or the number of processes.
        """
        super().__init__()
        self.cfg = cfg
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.autocast_dtype = autocast_dtype(cfg)
        self.network = build_model(cfg).train()
        if self.device.type == "cpu":
            self.network = replace_sync_batch_norm(self.network)
        self.model: nn.Module = self.network
        self.optimizer = build_optimizer(cfg, self.network)
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        self.clip_gradients = build_gradient_clipper(cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype == torch.float16)
        self.clock = TrainingClock()
        self.checkpointer = Checkpointer(
            self.network,
            cfg.OUTPUT_DIR,
            keep=cfg.CHECKPOINT.KEEP,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            scaler=self.scaler,
            clock=self.clock,
        )
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.last_results: Results = {}
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """Timing, learning rate, checkpoints, evaluation and, last, the writers that report on all of them."""
        cfg = self.cfg
        # Times from the first iteration on: detectron2's printer divides by zero in runs that end before there is one.
        result = [self.clock, hooks.IterationTimer(warmup_iter=0), hooks.LRScheduler(self.optimizer, self.scheduler)]
        if comm.is_main_process():
            result.append(hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD))
        result.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self.evaluate))
        if comm.is_main_process():
            writers = [CommonMetricPrinter(self.max_iter)]
            if cfg.OUTPUT_DIR:
                writers += [JSONWriter(f"{cfg.OUTPUT_DIR}/metrics.json"), TensorboardXWriter(cfg.OUTPUT_DIR)]
            result.append(hooks.PeriodicWriter(writers, period=20))
        return result

    def resume_or_load(self, *, resume: bool) -> None:
        """Go on from the last checkpoint in ``OUTPUT_DIR`` if ``resume`` is set and there is one; else load weights."""
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.checkpointer.resume()["iteration"] + 1
            # Dropout and augmentation go on with other random numbers than those of the first iterations.
            seed_everything(self.cfg.SEED, comm.get_rank(), start=self.start_iter)
            logger.info(f"Going on at iteration {self.start_iter} of {self.max_iter}")
        else:
            load_parts(self.network, self.cfg, strict=False)

    def train(self) -> Results:
        """Train from ``start_iter`` to ``SOLVER.MAX_ITER``.

        Returns:
            The metrics of the last evaluation, {dataset: {task: {metric: value}}}; {} but in the main process.

        Raises:
            NonFiniteLossError: a loss is NaN or infinite.
        """
        logger.info(f"Training from iteration {self.start_iter} to {self.max_iter}")
        self.model = distribute(self.network, self.device)
        loader = build_train_loader(self.cfg, start_iteration=self.start_iter)
        self.batches = iter(loader)
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage:
            self.before_train()
            try:
                for iteration in range(self.start_iter, self.max_iter):
                    self.iter = iteration
                    self.before_step()
                    self.run_step()
                    self.after_step()
            except BaseException:
                # What was measured before; evaluation and the like would hide the error.
                for hook in self._hooks:
                    if isinstance(hook, hooks.PeriodicWriter):
                        hook.after_train()
                raise
            self.iter = self.max_iter - 1
            self.after_train()
        skipped = sum(comm.all_gather(loader.num_skipped))
        if skipped:
            logger.warning(f"{skipped} times a training image could not be decoded and another one took its place")
        return self.last_results

    def run_step(self) -> None:
        """One forward pass, backward pass and update."""
        start = time.perf_counter()
        batch = next(self.batches)
        data_time = time.perf_counter() - start
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            losses = self.model(batch)
            total = sum(losses.values())
        # Before the backward pass: a NaN that reached the weights would be saved with them.
        self.report(losses, data_time, batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        if self.clip_gradients:
            self.scaler.unscale_(self.optimizer)
            norm = self.clip_gradients(list(self.network.parameters()))
            if norm is not None:
                self.storage.put_scalar("grad_norm", float(norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def report(self, losses: dict[str, Tensor], data_time: float, batch: list[dict[str, Any]]) -> None:
        """Store the losses, averaged over the processes, and stop all of them if one is not finite."""
        names = sorted(losses)
        values = torch.stack([losses[name].detach().float() for name in names])
        values = torch.cat([values, values.new_tensor([data_time])])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(values)
            values /= comm.get_world_size()
        *values, data_time = values.tolist()
        mean = dict(zip(names, values, strict=True))
        bad = ", ".join(f"{name} is {value}" for name, value in mean.items() if not math.isfinite(value))
        if bad:
            finite_here = all(bool(torch.isfinite(loss)) for loss in losses.values())
            files = [] if finite_here else [str(x.get("file_name", x.get("image_id"))) for x in batch]
            files = [file for of_process in comm.all_gather(files) for file in of_process]
            raise NonFiniteLossError(
                f"iteration {self.iter}: {bad}, expected finite losses (lower SOLVER.BASE_LR?); "
                f"images: {', '.join(files)}"
            )
        self.storage.put_scalar("data_time", data_time)
        self.storage.put_scalars(total_loss=sum(values), **mean)

    def evaluate(self) -> Results:
        """Metrics of all ``DATASETS.TEST``, also written to ``OUTPUT_DIR/results.json``."""
        if comm.get_world_size() > 1:
            # Each process has its own running statistics; the main process's are the ones that are saved.
            for buffer in (buffer for module in batch_norms(self.network) for buffer in module.buffers()):
                torch.distributed.broadcast(buffer, 0)
        extra = {"iteration": self.iter + 1, "seconds": self.clock.seconds}
        self.last_results = evaluate(self.cfg, self.network, extra=extra)
        return self.last_results


def autocast_dtype(cfg: CfgNode) -> torch.dtype | None:
    """The dtype that ``SOLVER.AMP`` asks for, None if it is off."""
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    if cfg.SOLVER.AMP.DTYPE == "float16" and torch.device(cfg.MODEL.DEVICE).type == "cpu":
        raise ValueError("SOLVER.AMP.DTYPE is float16, which needs CUDA; on the CPU use bfloat16")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}[cfg.SOLVER.AMP.DTYPE]


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` for this process of several; itself if there is only one."""
    if comm.get_world_size() == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[comm.get_local_rank()] if device.type == "cuda" else None,
        # Statistics of plain batch normalisation differ between processes unless one process sets them for all.
        broadcast_buffers=any(not isinstance(module, nn.SyncBatchNorm) for module in batch_norms(model)),
        find_unused_parameters=False,
    )


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` that keep statistics of its inputs."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def replace_sync_batch_norm(model: nn.Module) -> nn.Module:
    """SyncBatchNorm, which raises on the CPU in a process group, as BatchNorm over each process's own images."""
    count = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.SyncBatchNorm):
                plain = nn.BatchNorm2d(child.num_features, child.eps, child.momentum, child.affine)
                plain.load_state_dict(child.state_dict())
                for parameter, old in zip(plain.parameters(), child.parameters(), strict=True):
                    parameter.requires_grad_(old.requires_grad)
                setattr(module, name, plain.train(child.training))
                count += 1
    if count:
        logger.info(f"{count} SyncBatchNorm layers run as BatchNorm, each process by itself: the CPU has no other form")
    return model
