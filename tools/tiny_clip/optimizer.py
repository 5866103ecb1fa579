"""Muon for matrices, AdamW for the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    As torch.optim.Muon, for the kernels of convolutions too, and in float32: half precision is slow on most CPUs.
    """

    def __init__(self, params: list[Tensor], *, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalised(parameter.grad.lerp(average, group["momentum"]).flatten(1))
                # This factor gives updates of the size that AdamW's have, so that both share one learning rate.
                size = group["lr"] * 0.2 * max(update.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update.reshape(parameter.shape), alpha=size)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Matrix (A, B) with its singular values moved to about 1: five Newton-Schulz steps with Muon's coefficients."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def build_optimizers(model: nn.Module, *, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner matrices and kernels, AdamW for embeddings, the attention pool (large) and vectors."""
    inner, outer, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif "resblocks" in name or name.startswith("visual.layer"):
            inner.append(parameter)
        else:
            outer.append(parameter)
    groups = [{"params": outer, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [Muon(inner, lr=lr, weight_decay=weight_decay), torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))]
