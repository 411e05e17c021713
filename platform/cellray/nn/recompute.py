"""Blocks that keep less for the backward pass, or are compiled: switches on a built model.

A block says that it may be by the class attribute ``recomputable``. Parameters, their names and
the state dict stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["compile_blocks", "recompute_blocks"]


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if getattr(type(m), "recomputable", False)]


def recompute_blocks(model: nn.Module) -> int:
    """Have every block keep only its input, and compute the rest anew in the backward pass.

    Random draws inside a block (dropout) are repeated as they were. Gradients are the same.

    Returns:
        How many blocks.
    """
    blocks = _blocks(model)
    for block in blocks:
        block.forward = _recomputed(block, block.forward)
    return len(blocks)


def _recomputed(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def compile_blocks(model: nn.Module) -> int:
    """Compile every block with ``torch.compile``; what it cannot compile runs as it is.

    Batches differ in shape, so shapes are left open. A block's ``attention`` runs as it is: its
    kernels are compiled already, and it chooses between them by what a batch holds.

    Returns:
        How many blocks.
    """
    blocks = _blocks(model)
    for block in blocks:
        attention = getattr(block, "attention", None)
        if isinstance(attention, nn.Module):
            attention.forward = torch.compiler.disable(attention.forward)  # type: ignore[no-untyped-call]
        compiled: Callable[..., Any] = torch.compile(block.forward, dynamic=True)
        block.forward = compiled
    return len(blocks)
