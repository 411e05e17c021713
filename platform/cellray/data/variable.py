"""Choosing variable genes from streamed moments of depth-normalised counts.

The score is the log variance-to-mean ratio, standardised by median and MAD among genes of like
mean (the scheme of Zheng et al. 2017, doi:10.1038/ncomms14049). Moments add up over blocks, so any
number of cells is scored in the memory of one block.

Legend: G genes, N cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellray.core.blocks import CellBlock, row_ids
from cellray.core.errors import DataError

__all__ = ["GeneMoments", "choose_variable"]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_BINS = 20


@dataclass(frozen=True)
class GeneMoments:
    """Sums over cells, per gene; ``a + b`` merges two groups of cells.

    Shapes:
        total, square: (G,) float64 sums of the normalised counts and of their squares.
        detected: (G,) int64 cells with a count.
        num_cells: N.
    """

    total: F64
    square: F64
    detected: I64
    num_cells: int

    @classmethod
    def of_block(cls, block: CellBlock, num_genes: int, *, target_sum: float = 1e4) -> GeneMoments:
        """Moments of a block over a vocabulary of ``num_genes``; library sizes are the block's."""
        sizes = block.library_sizes.astype(np.float64)
        factor = np.divide(target_sum, sizes, out=np.zeros_like(sizes), where=sizes > 0)
        values: F64 = block.counts.astype(np.float64) * factor[row_ids(block.indptr)]
        return cls(
            total=_sums(block, values, num_genes),
            square=_sums(block, values**2, num_genes),
            detected=np.bincount(block.genes, minlength=num_genes).astype(np.int64),
            num_cells=len(block),
        )

    def __add__(self, other: GeneMoments) -> GeneMoments:
        return GeneMoments(
            self.total + other.total,
            self.square + other.square,
            self.detected + other.detected,
            self.num_cells + other.num_cells,
        )


def _sums(block: CellBlock, values: F64, num_genes: int) -> F64:
    return np.bincount(block.genes, weights=values, minlength=num_genes).astype(np.float64)


def _standardised(dispersion: F64, mean: F64) -> F64:
    """(x - median) / MAD within 20 quantile bins of the mean."""
    edges = np.quantile(mean, np.linspace(0, 1, _BINS + 1)[1:-1])
    bins = np.searchsorted(edges, mean, side="right")
    result = np.zeros_like(dispersion)
    for index in np.unique(bins):
        inside = bins == index
        centre = np.median(dispersion[inside])
        spread = np.median(np.abs(dispersion[inside] - centre))
        result[inside] = (dispersion[inside] - centre) / (spread if spread > 0 else 1.0)
    return result


def choose_variable(moments: GeneMoments, *, num_genes: int, min_cells: int = 3) -> I64:
    """The genes whose dispersion stands out among genes of like mean.

    Args:
        moments: of the training cells.
        num_genes: genes at most.
        min_cells: cells that must detect a candidate.

    Returns:
        (K,) ascending gene positions; ties go to the lower position.

    Raises:
        DataError: no gene varies.
    """
    num = moments.num_cells
    mean = moments.total / max(num, 1)
    variance = np.maximum(moments.square / max(num, 1) - mean**2, 0.0) * (num / max(num - 1, 1))
    enough = moments.detected >= min(min_cells, num)
    candidates = np.flatnonzero(enough & (variance > 0) & (mean > 0))
    if not len(candidates):
        raise DataError(
            f"no gene varies among the {num} training cells (detected in at least {min_cells}); "
            "train on more cells or lower min_cells"
        )
    dispersion = np.log(variance[candidates] / mean[candidates])
    score = _standardised(dispersion, mean[candidates])
    best = np.argsort(-score, kind="stable")[:num_genes]
    return np.sort(candidates[best]).astype(np.int64)
