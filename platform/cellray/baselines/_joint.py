"""What baselines share that correct batches: they see training and asked cells together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import sparse

from cellray.baselines.base import CellCounts
from cellray.core.errors import DataError

__all__ = ["batch_names", "joined", "parted"]

F32 = npt.NDArray[np.float32]


def joined(cells: CellCounts, query: CellCounts | None) -> CellCounts:
    """Both sets of cells as one, the first ones first."""
    if query is None:
        return cells
    counts = sparse.csr_matrix(sparse.vstack([cells.counts, query.counts]))
    if cells.batches is None or query.batches is None:
        return CellCounts(counts)
    return CellCounts(counts, np.concatenate([cells.batches, query.batches]))


def parted(vectors: F32, num: int, query: CellCounts | None) -> tuple[F32, F32 | None]:
    """The vectors of the first ``num`` cells, and those of the query."""
    return vectors[:num], (None if query is None else vectors[num:])


def batch_names(cells: CellCounts, name: str) -> list[str]:
    """The batch of each cell as text.

    Raises:
        DataError: there are fewer than two.
    """
    if cells.batches is None or len(np.unique(cells.batches)) < 2:  # noqa: PLR2004
        raise DataError(
            f"baseline '{name}' corrects batches and the cells are of one; name the obs column of "
            "the batches in task.batch, or leave the baseline out"
        )
    return [str(code) for code in cells.batches]
