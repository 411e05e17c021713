"""From coordinates as a store returns them to compressed rows, in two linear passes.

TileDB returns counts as (joinid, gene, count) triples in chunks. Each chunk is reduced at once,
while it is in the processor's cache, to 8 bytes a count: genes are looked up in the vocabulary,
counts of other genes only add to the library size, and the row is noted once for each stretch of
triples that belong to one cell. At the end the stretches are copied to the rows of the request.

Legend: N cells of the request, V genes of the store, Z counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from scipy import sparse

from cellray.core.errors import DataError

__all__ = ["RowGatherer", "RowLookup"]

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])

_MAX_LOOKUP = 1 << 28  # joinids; the table is touched only where cells are asked for
_MAX_COUNTS = (1 << 31) - 1  # of one block: Arrow's list offsets are 32-bit


def _kernel(function: F) -> F:
    return cast(F, numba.njit(cache=True, nogil=True)(function))


@_kernel
def _reduce(
    joinids: Array,
    genes: Array,
    counts: Array,
    gene_map: Array,
    out_genes: Array,
    out_counts: Array,
    stretch_ids: Array,
    stretch_ends: Array,
    stretch_sums: Array,
) -> tuple[int, int]:
    """Keep vocabulary genes of one chunk; returns (counts kept, stretches)."""
    kept = 0
    stretches = 0
    total = 0.0
    i = 0
    n = len(joinids)
    num_genes = len(gene_map)
    while i < n:
        cell = joinids[i]
        total = 0.0
        while i < n and joinids[i] == cell:
            count = counts[i]
            total += count
            # a gene beyond the map was added to the store after it was opened
            gene = gene_map[genes[i]] if genes[i] < num_genes else np.int32(-1)
            if gene >= 0 and count != 0:
                out_genes[kept] = gene
                out_counts[kept] = count
                kept += 1
            i += 1
        stretch_ids[stretches] = cell
        stretch_ends[stretches] = kept
        stretch_sums[stretches] = total
        stretches += 1
    return kept, stretches


@_kernel
def _place(
    rows: Array,
    ends: Array,
    genes: Array,
    counts: Array,
    cursors: Array,
    out_genes: Array,
    out_counts: Array,
    starts: Array,
) -> bool:
    """Copy the stretches of a chunk to their rows; whether genes ascend in every row so far."""
    ascending = True
    begin = 0
    for s in range(len(rows)):
        row = rows[s]
        at = cursors[row]
        last = out_genes[at - 1] if at > starts[row] else np.int32(-1)
        for i in range(begin, ends[s]):
            gene = genes[i]
            if gene <= last:
                ascending = False
            last = gene
            out_genes[at] = gene
            out_counts[at] = counts[i]
            at += 1
        cursors[row] = at
        begin = ends[s]
    return ascending


class RowLookup:
    """From joinid to the row of the request: a table where it fits, else a binary search.

    Args:
        joinids: (N,) the requested cells in the order of the request, at least one.
    """

    def __init__(self, joinids: I64) -> None:
        self._order = np.argsort(joinids, kind="stable").astype(np.int32)
        self._ascending = joinids[self._order]
        self._low = int(self._ascending[0])
        span = int(self._ascending[-1]) - self._low + 1
        self._table: I32 | None = None
        if span <= _MAX_LOOKUP:
            # left unfilled on purpose: only joinids of the request are ever looked up
            self._table = np.empty(span, dtype=np.int32)
            self._table[self._ascending - self._low] = self._order

    def __call__(self, joinids: I64) -> I32:
        """Rows of joinids, all of which are among those requested."""
        if self._table is not None:
            return self._table[joinids - self._low]
        found: I32 = self._order[np.searchsorted(self._ascending, joinids)]
        return found


class RowGatherer:
    """Collects the chunks of one read; then gives the rows.

    Args:
        joinids: (N,) the requested cells in the order of the request, distinct, at least one.
        gene_map: (V,) int32 vocabulary index of each gene of the store, -1 where there is none.
    """

    def __init__(self, joinids: I64, gene_map: I32) -> None:
        self._num_cells = len(joinids)
        self._gene_map = np.ascontiguousarray(gene_map, dtype=np.int32)
        self._lookup = RowLookup(joinids)
        self._chunks: list[tuple[I32, I64, I32, F32]] = []
        self._sizes = np.zeros(self._num_cells, dtype=np.float64)
        self._lengths = np.zeros(self._num_cells, dtype=np.int64)

    def add(self, joinids: I64, genes: I64, counts: Array) -> None:
        """Take in a chunk of Z triples, all of requested cells, in any order.

        Raises:
            DataError: the block holds 2^31 counts or more.
        """
        size = len(joinids)
        out_genes = np.empty(size, dtype=np.int32)
        out_counts = np.empty(size, dtype=np.float32)
        ids = np.empty(size, dtype=np.int64)
        ends = np.empty(size, dtype=np.int64)
        sums = np.empty(size, dtype=np.float64)
        values = counts if counts.dtype == np.float32 else counts.astype(np.float32)
        kept, stretches = _reduce(
            joinids, genes, values, self._gene_map, out_genes, out_counts, ids, ends, sums
        )
        rows = self._lookup(ids[:stretches])
        self._sizes += np.bincount(rows, weights=sums[:stretches], minlength=self._num_cells)
        each = np.diff(ends[:stretches], prepend=0)
        self._lengths += np.bincount(rows, weights=each, minlength=self._num_cells).astype(np.int64)
        total = int(self._lengths.sum())
        if total > _MAX_COUNTS:
            raise DataError(
                f"a block of {self._num_cells} cells holds more than {_MAX_COUNTS:,} counts, more "
                "than its 32-bit offsets can address; read fewer cells at a time "
                "(data.window_cells, or cells_per_block)"
            )
        # copies, so that the chunk's larger arrays are let go
        self._chunks.append(
            (rows, ends[:stretches].copy(), out_genes[:kept].copy(), out_counts[:kept].copy())
        )

    def rows(self) -> tuple[I64, I32, F32, F32]:
        """The rows of the request.

        Returns:
            indptr (N+1,), genes (Z,) ascending within a cell, counts (Z,) without zeros, and
            library sizes (N,) over all genes of the store. Counts of one cell and gene that the
            store holds more than once are added up.
        """
        indptr = np.zeros(self._num_cells + 1, dtype=np.int64)
        np.cumsum(self._lengths, out=indptr[1:])
        genes = np.empty(indptr[-1], dtype=np.int32)
        counts = np.empty(indptr[-1], dtype=np.float32)
        cursors = indptr[:-1].copy()
        ascending = True
        while self._chunks:
            rows, ends, chunk_genes, chunk_counts = self._chunks.pop(0)
            ascending &= _place(
                rows, ends, chunk_genes, chunk_counts, cursors, genes, counts, indptr[:-1]
            )
        if not ascending:
            width = int(self._gene_map.max()) + 1
            matrix = sparse.csr_matrix((counts, genes, indptr), shape=(self._num_cells, width))
            matrix.sum_duplicates()
            indptr, genes, counts = matrix.indptr, matrix.indices, matrix.data
        return (
            indptr.astype(np.int64, copy=False),
            genes.astype(np.int32, copy=False),
            counts,
            self._sizes.astype(np.float32),
        )
