"""Layers that know which technical batch a cell is of: domain norm, batch labels, an adversary.

As in scGPT's integration recipe (doi:10.1038/s41592-024-02201-0).

Legend: B cells, T tokens, D width, C batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cellray.nn.heads import MlpClassifier
from cellray.nn.norm import RowNorm

__all__ = ["BatchAdversary", "BatchLabels", "DomainNorm", "reverse_gradient"]

Tensor = torch.Tensor

_EPS = 6.1e-5


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return -ctx.factor * grads[0], None


def reverse_gradient(x: Tensor, factor: float = 1.0) -> Tensor:
    """The same tensor, whose gradient comes back multiplied by ``-factor``."""
    out: Tensor = _Reverse.apply(x, factor)  # type: ignore[no-untyped-call]
    return out


class DomainNorm(nn.Module):
    """Batch norm without weights over a cell's tokens, one for each technical batch.

    Cells of several batches may share a mini-batch (the source normalises all of them by the first
    cell's batch), and padding is not counted. In training, a batch with a single token present is
    normalised by the running statistics.

    Args:
        width: D.
        num_domains: C; 1 is a plain batch norm for all.
        affine: whether each has weights of its own.
    """

    def __init__(self, width: int, *, num_domains: int, affine: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            RowNorm(width, eps=_EPS, affine=affine) for _ in range(num_domains)
        )

    def forward(self, hidden: Tensor, domains: Tensor, real: Tensor) -> Tensor:
        """(..., D) with each token's batch and whether it is real, both (...).

        Padding, and cells of an unknown batch (-1), stay as they are.
        """
        out = hidden.clone()
        known = domains if len(self.norms) > 1 else torch.zeros_like(domains)
        for number, norm in enumerate(self.norms):
            where = real & (known == number)
            tokens = hidden[where]
            if not len(tokens):
                continue
            out[where] = norm(tokens)
        return out


class BatchLabels(nn.Module):
    """A normed vector a technical batch, laid beside what a decoder reads.

    Args:
        num_batches: C.
        width: D.
    """

    def __init__(self, num_batches: int, *, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_batches, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, codes_B: Tensor) -> Tensor:
        """(B,) int64 -> (B, D)."""
        embedded_BD: Tensor = self.norm(self.table(codes_B))
        return embedded_BD


class BatchAdversary(nn.Module):
    """Tells batches by cell embeddings; through it the encoder learns not to let it.

    Args:
        width: D.
        num_batches: C.
    """

    def __init__(self, width: int, *, num_batches: int) -> None:
        super().__init__()
        self.classifier = MlpClassifier(
            width, num_classes=num_batches, num_hidden=2, activation=nn.LeakyReLU
        )

    def forward(self, cell_BD: Tensor) -> Tensor:
        """(B, D) -> (B, C) logits, with the gradient reversed on the way back."""
        logits_BC: Tensor = self.classifier(reverse_gradient(cell_BD))
        return logits_BC
