"""From coordinates as a store returns them to compressed rows, in one linear pass.

TileDB returns counts as (joinid, gene, count) triples in chunks. Each chunk is reduced at once,
while it is in the processor's cache, to 8 bytes a count: genes are looked up in the vocabulary,
counts of other genes only add to the library size, and the row is noted once for each stretch of
triples that belong to one cell. Stretches of cells that are asked for in the store's own order lie
where they belong already; others are copied to their rows at the end.

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
) -> tuple[int, int, bool]:
    """Keep vocabulary genes of one chunk.

    Returns:
        Counts kept, stretches, and whether genes ascend within each stretch.
    """
    kept = 0
    stretches = 0
    ascending = True
    i = 0
    n = len(joinids)
    num_genes = len(gene_map)
    while i < n:
        cell = joinids[i]
        total = 0.0
        last = np.int32(-1)
        while i < n and joinids[i] == cell:
            count = counts[i]
            total += count
            # a gene beyond the map was added to the store after it was opened
            gene = gene_map[genes[i]] if genes[i] < num_genes else np.int32(-1)
            if gene >= 0 and count != 0:
                if gene <= last:
                    ascending = False
                last = gene
                out_genes[kept] = gene
                out_counts[kept] = count
                kept += 1
            i += 1
        stretch_ids[stretches] = cell
        stretch_ends[stretches] = kept
        stretch_sums[stretches] = total
        stretches += 1
    return kept, stretches, ascending


@_kernel
def _place(
    rows: Array,
    ends: Array,
    genes: Array,
    counts: Array,
    cursors: Array,
    out_genes: Array,
    out_counts: Array,
) -> None:
    """Copy stretches to their rows, those of one row one behind the other."""
    begin = 0
    for s in range(len(rows)):
        at = cursors[rows[s]]
        for i in range(begin, ends[s]):
            out_genes[at] = genes[i]
            out_counts[at] = counts[i]
            at += 1
        cursors[rows[s]] = at
        begin = ends[s]


@_kernel
def _ascend(indptr: Array, genes: Array) -> bool:
    """Whether the genes of every row ascend."""
    for row in range(len(indptr) - 1):
        for i in range(indptr[row] + 1, indptr[row + 1]):
            if genes[i] <= genes[i - 1]:
                return False
    return True


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
        self._genes = np.empty(0, dtype=np.int32)
        self._counts = np.empty(0, dtype=np.float32)
        self._kept = 0
        self._rows: list[I32] = []
        self._ends: list[I64] = []
        self._ascending = True
        self._sizes = np.zeros(self._num_cells, dtype=np.float64)
        self._lengths = np.zeros(self._num_cells, dtype=np.int64)

    def _grow(self, least: int) -> None:
        """Make room for ``least`` counts; the kernel touches no more than it needs of it."""
        if least <= len(self._genes):
            return
        seen = sum(map(len, self._rows))  # a cell more than once at most, at a chunk's edge
        expected = self._kept * self._num_cells // max(seen, 1)
        capacity = max(least, int(1.1 * expected), int(1.5 * self._kept))
        for name in ("_genes", "_counts"):
            old = getattr(self, name)
            new = np.empty(capacity, dtype=old.dtype)
            new[: self._kept] = old[: self._kept]
            setattr(self, name, new)

    def add(self, joinids: I64, genes: I64, counts: Array) -> None:
        """Take in a chunk of Z triples, all of requested cells, in any order.

        Raises:
            DataError: the block holds 2^31 counts or more.
        """
        size = len(joinids)
        self._grow(self._kept + size)
        ids = np.empty(size, dtype=np.int64)
        ends = np.empty(size, dtype=np.int64)
        sums = np.empty(size, dtype=np.float64)
        values = counts if counts.dtype == np.float32 else counts.astype(np.float32)
        out = slice(self._kept, self._kept + size)
        kept, stretches, ascending = _reduce(
            joinids,
            genes,
            values,
            self._gene_map,
            self._genes[out],
            self._counts[out],
            ids,
            ends,
            sums,
        )
        rows = self._lookup(ids[:stretches])
        self._sizes += np.bincount(rows, weights=sums[:stretches], minlength=self._num_cells)
        each = np.diff(ends[:stretches], prepend=0)
        self._lengths += np.bincount(rows, weights=each, minlength=self._num_cells).astype(np.int64)
        if self._kept + kept > _MAX_COUNTS:
            raise DataError(
                f"a block of {self._num_cells} cells holds more than {_MAX_COUNTS:,} counts, more "
                "than its 32-bit offsets can address; read fewer cells at a time "
                "(data.window_cells, or cells_per_block)"
            )
        self._rows.append(rows)
        self._ends.append(ends[:stretches] + self._kept)
        self._ascending &= ascending
        self._kept += kept

    def rows(self) -> tuple[I64, I32, F32, F32]:
        """The rows of the request.

        Returns:
            indptr (N+1,), genes (Z,) ascending within a cell, counts (Z,) without zeros, and
            library sizes (N,) over all genes of the store. Counts of one cell and gene that the
            store holds more than once are added up.
        """
        indptr = np.zeros(self._num_cells + 1, dtype=np.int64)
        np.cumsum(self._lengths, out=indptr[1:])
        rows = np.concatenate(self._rows) if self._rows else np.zeros(0, dtype=np.int32)
        genes, counts = self._genes[: self._kept], self._counts[: self._kept]
        if not bool(np.all(rows[1:] > rows[:-1])):  # a cell in two stretches is looked at anew
            self._ascending = False
            if not bool(np.all(rows[1:] >= rows[:-1])):
                genes, counts = self._placed(rows, indptr)
        if not self._ascending and not _ascend(indptr, genes):
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

    def _placed(self, rows: I32, indptr: I64) -> tuple[I32, F32]:
        """The stretches, each in the row of its cell."""
        genes, counts = np.empty_like(self._genes[: self._kept]), np.empty(self._kept, np.float32)
        ends = np.concatenate(self._ends)
        _place(rows, ends, self._genes, self._counts, indptr[:-1].copy(), genes, counts)
        return genes, counts
