"""AdamW's parameter groups and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from cellray.train.config import OptimSection

__all__ = ["build_adamw", "learning_rate", "set_learning_rate"]


def learning_rate(step: int, *, total_steps: int, optim: OptimSection) -> float:
    """Learning rate of optimizer step ``step`` (counted from 0) out of ``total_steps``.

    Rises linearly over ``warmup_steps``, the first step already above 0, then follows the
    schedule down to ``final_lr_fraction`` of the peak at the last step.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    span = max(total_steps - optim.warmup_steps, 1)
    done = min((step - optim.warmup_steps) / span, 1.0)
    shape = 1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.lr * (optim.final_lr_fraction + (1 - optim.final_lr_fraction) * shape)


def build_adamw(module: nn.Module, optim: OptimSection) -> torch.optim.AdamW:
    """AdamW in two groups: matrices with weight decay; biases, norms and vectors without.

    Torch's fused kernel takes the step, on a GPU and on a CPU.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=optim.lr,
        betas=(optim.beta_1, optim.beta_2),
        eps=optim.eps,
        fused=all(p.device.type in ("cpu", "cuda") for p in trainable),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr
