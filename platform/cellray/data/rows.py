"""From coordinates to compressed rows, in linear passes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import sparse

__all__ = ["RowLookup", "remap"]

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]

_MAX_LOOKUP = 1 << 28  # joinids; the table is touched only where cells are asked for


class RowLookup:
    """From joinid to the row of the request: a table where it fits, else a binary search.

    Args:
        ascending: (N,) the requested joinids, sorted.
        order: (N,) the row of the request that each of them is.
    """

    def __init__(self, ascending: I64, order: I64) -> None:
        self._ascending, self._rows = ascending, order.astype(np.int32)
        self._low = int(ascending[0])
        span = int(ascending[-1]) - self._low + 1
        self._table: I32 | None = None
        if span <= _MAX_LOOKUP:
            # left unfilled on purpose: only joinids of the request are ever looked up
            self._table = np.empty(span, dtype=np.int32)
            self._table[ascending - self._low] = self._rows

    def __call__(self, joinids: I64) -> I32:
        """Rows of joinids, all of which are among those requested."""
        if self._table is not None:
            return self._table[joinids - self._low]
        found: I32 = self._rows[np.searchsorted(self._ascending, joinids)]
        return found


def remap(matrix: sparse.csr_matrix, gene_map: I32) -> tuple[I64, I32, npt.NDArray[np.float32]]:
    """Counts over the store's genes as counts over the vocabulary's.

    Args:
        matrix: (N, V) counts, genes ascending within a cell.
        gene_map: (V,) vocabulary index of each gene, -1 where there is none.

    Returns:
        indptr (N+1,), genes (Z,) ascending within a cell, counts (Z,) without zeros.
    """
    genes = gene_map[matrix.indices]
    keep = (genes >= 0) & (matrix.data != 0)
    indptr = matrix.indptr.astype(np.int64)
    counts = matrix.data
    if not keep.all():
        kept = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])
        indptr, genes, counts = kept[indptr], genes[keep], counts[keep]
    known = gene_map[gene_map >= 0]
    if np.all(known[1:] > known[:-1]):
        return indptr, genes, counts
    width = int(known.max()) + 1
    shape = (len(indptr) - 1, width)
    # two transpositions are two counting sorts: they leave every row ascending
    turned = sparse.csr_matrix((counts, genes, indptr), shape=shape).tocsc().tocsr()
    return turned.indptr.astype(np.int64), turned.indices.astype(np.int32), turned.data
