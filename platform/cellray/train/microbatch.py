"""A rank's cells of a step, cut into micro-batches of cells of like length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cellray.core.batch import CellBatch
from cellray.core.blocks import TokenBlock
from cellray.core.draw import Draw
from cellray.data.collate import collate_packed, collate_tokens
from cellray.objectives.base import Objective

__all__ = ["Collator", "cut_points", "most_tokens"]

I64 = npt.NDArray[np.int64]


def cut_points(lengths: I64, *, cells_micro: int, tokens_micro: int, packed: bool) -> list[int]:
    """Where micro-batches begin and end.

    Args:
        lengths: (N,) tokens of the cells; ascending if ``tokens_micro``.
        cells_micro: most cells of a micro-batch.
        tokens_micro: most tokens of one, 0 for no limit; of padded cells their slots count. A cell
            that is longer has a micro-batch of its own.
        packed: whether cells lie end to end.

    Returns:
        0, the ends of all micro-batches but the last, and N.
    """
    ends = [0]
    total = np.concatenate([[0], np.cumsum(lengths)])
    while ends[-1] < len(lengths):
        start = ends[-1]
        stop = min(start + cells_micro, len(lengths))
        if tokens_micro and packed:
            stop = min(stop, int(np.searchsorted(total, total[start] + tokens_micro, "right")) - 1)
        elif tokens_micro:
            slots = np.arange(1, stop - start + 1) * lengths[start:stop]
            stop = start + int(np.searchsorted(slots, tokens_micro, "right"))
        ends.append(max(stop, start + 1))
    return ends


@dataclass(frozen=True)
class Collator:
    """Cuts a rank's cells of a step into corrupted micro-batches of cells of like length.

    Losses are sums over the step's cells, so which micro-batch a cell is in changes no loss and no
    gradient (but of what looks at cells together: batch norms, elastic similarity), and sorted by
    length the cells need less padding.

    Attributes:
        objective: hides what is to be predicted.
        pad: token id of ``<pad>``.
        cells_micro: most cells of a micro-batch.
        seed: the run's seed.
        packed: lay cells end to end instead of padding them.
        tokens_micro: most tokens of a micro-batch, see :func:`cut_points`.
        fixed_length: tokens that the model reads of any cell (a panel, pathways), which count for
            the limit instead of the cell's own; 0 if it reads the cell's.
    """

    objective: Objective
    pad: int
    cells_micro: int
    seed: int
    packed: bool = False
    tokens_micro: int = 0
    fixed_length: int = 0

    def __call__(
        self,
        block: TokenBlock,
        covariates: Mapping[str, npt.NDArray[np.int64]],
        *,
        epoch: int,
        step: int = 0,
    ) -> list[CellBatch]:
        """Micro-batches, the shortest cells first; cells of equal length in the block's order."""
        collate = collate_packed if self.packed else collate_tokens
        lengths = np.maximum(np.diff(block.indptr), 1).astype(np.int64)
        order = np.arange(len(block))
        if len(block) > self.cells_micro or self.tokens_micro:
            order = np.argsort(np.diff(block.indptr), kind="stable")
        draw = Draw(self.seed, epoch)
        read = lengths[order]
        ends = cut_points(
            np.full_like(read, self.fixed_length) if self.fixed_length else read,
            cells_micro=self.cells_micro,
            tokens_micro=self.tokens_micro,
            packed=self.packed,
        )
        batches = []
        for start, stop in pairwise(ends):
            rows = order[start:stop]
            codes = {name: c[rows] for name, c in covariates.items()}
            part = block.take(rows)
            batch = collate(part, pad=self.pad, covariates=codes, step=step)
            batches.append(self.objective.corrupt(batch, draw))
        return batches


def most_tokens(
    measure: Callable[[int], float], budget_bytes: float, *, first: int, most: int
) -> int:
    """The most tokens of a micro-batch whose pass keeps within a memory budget.

    Two small passes give bytes a token; the number that follows is tried, and taken back by a tenth
    until it fits.

    Args:
        measure: tokens -> bytes at the pass's peak (inf: it did not fit).
        budget_bytes: what a pass may take.
        first: tokens of the smaller trial, one long cell.
        most: no more are tried (the cells of a step).

    Returns:
        Tokens, at least ``first``, which is kept even where it does not fit.
    """
    first = min(first, most)
    second = min(2 * first, most)
    small = measure(first)
    if second == first or small > budget_bytes:
        return first
    large = measure(second)
    if large > budget_bytes:
        return first
    per_token = max((large - small) / (second - first), 1.0)
    wanted = int(first + (0.95 * budget_bytes - small) / per_token)
    tokens = max(second, min(wanted, most))
    while tokens > second and measure(tokens) > budget_bytes:
        tokens = max(int(tokens * 0.9), second)
    return tokens
