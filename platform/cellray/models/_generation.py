"""Iterative generation: unknown values filled in by confidence, a share of them at a time.

Legend: B cells, T tokens, U unknown tokens of a batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from cellray.core.batch import CellBatch
from cellray.core.errors import ConfigError, DataError

__all__ = ["PredictsUnknown", "generate_values"]

Tensor = torch.Tensor


class PredictsUnknown(Protocol):
    """Gives two predictions of every hidden value."""

    def predict_unknown(
        self, batch: CellBatch, cell_prompt: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Two values at every unknown token, (U,) each, in row-major order."""
        ...


def generate_values(
    model: PredictsUnknown,
    batch: CellBatch,
    *,
    num_iterations: int,
    cell_prompt: Tensor | None = None,
) -> Tensor:
    """See ``Scgpt.generate``; of equally confident genes the first in the cell come first."""
    if num_iterations < 1:
        raise ConfigError(f"num_iterations = {num_iterations}: it takes at least 1")
    if batch.unknown_mask is None:
        raise DataError("the batch has no unknown_mask: nothing is to be generated")
    rows = batch.token_rows()
    unknown = batch.unknown_mask.clone()
    values = batch.values.float().masked_fill(unknown, 0.0)
    wanted_B = torch.bincount(rows[unknown], minlength=len(batch))
    for done in range(num_iterations):
        if not unknown.any():
            break
        now = replace(batch, values=values, unknown_mask=unknown, targets=None, target_mask=None)
        first_U, second_U = model.predict_unknown(now, cell_prompt)
        first_U, doubt_U = first_U.float(), (first_U - second_U).abs().float()
        # so many of a cell's genes are known after this iteration
        share_B = (wanted_B * (done + 1) + num_iterations - 1) // num_iterations
        left_B = torch.bincount(rows[unknown], minlength=len(batch))
        take_B = share_B - (wanted_B - left_B)
        rows_U = rows[unknown]
        order = torch.argsort(doubt_U, stable=True)
        order = order[torch.argsort(rows_U[order], stable=True)]  # cell by cell, surest first
        starts_B = torch.cumsum(left_B, 0) - left_B
        rank = torch.arange(len(order), device=order.device) - starts_B[rows_U[order]]
        accepted = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        accepted[order] = rank < take_B[rows_U[order]]
        places = torch.nonzero(unknown.reshape(-1)).squeeze(-1)[accepted]
        values.view(-1)[places] = first_U[accepted].clamp(min=0.0).to(values.dtype)
        unknown.view(-1)[places] = False
    return values
