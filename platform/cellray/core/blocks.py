"""Cells in motion before the model: raw counts as compressed rows, then ragged tokens.

Legend: N cells in a block, Z non-zero counts of the block, T tokens of the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["CellBlock", "TokenBlock", "row_ids"]

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]


def row_ids(indptr: npt.NDArray[np.integer]) -> I64:
    """The row of every element of a compressed-row array: (N+1,) offsets -> (Z,) row numbers."""
    return np.repeat(np.arange(len(indptr) - 1, dtype=np.int64), np.diff(indptr))


@dataclass(frozen=True)
class CellBlock:
    """N cells as compressed rows of raw counts over a gene vocabulary.

    Shapes:
        joinids: (N,) int64, the SOMA joinid of each cell.
        indptr: (N+1,) int64 offsets into ``genes`` and ``counts``.
        genes: (Z,) int32 vocabulary gene ids, ascending within a cell.
        counts: (Z,) float32 raw counts, > 0.
        library_sizes: (N,) float32 total counts of the cell over ALL genes of the store, also
            those the vocabulary lacks.
        obs: name -> (N,) array.
    """

    joinids: I64
    indptr: I64
    genes: I32
    counts: F32
    library_sizes: F32
    obs: Mapping[str, npt.NDArray[np.generic]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.joinids)

    def take(self, rows: npt.NDArray[np.integer]) -> CellBlock:
        """The cells at ``rows`` (positions within this block), in that order."""
        lengths = np.diff(self.indptr)[rows]
        indptr = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(lengths, out=indptr[1:])
        source = np.arange(indptr[-1], dtype=np.int64)
        source += np.repeat(self.indptr[:-1][rows] - indptr[:-1], lengths)
        return CellBlock(
            joinids=self.joinids[rows],
            indptr=indptr,
            genes=self.genes[source],
            counts=self.counts[source],
            library_sizes=self.library_sizes[rows],
            obs={name: column[rows] for name, column in self.obs.items()},
        )


@dataclass(frozen=True)
class TokenBlock:
    """N tokenised cells, laid end to end.

    Shapes:
        joinids: (N,) int64.
        indptr: (N+1,) int64 offsets into ``tokens`` and ``values``.
        tokens: (T,) int32 token ids (specials included).
        values: (T,) float32, what accompanies each token (a bin, a rank value); a family's
            tokenizer says what it means.
    """

    joinids: I64
    indptr: I64
    tokens: I32
    values: F32

    def __len__(self) -> int:
        return len(self.joinids)

    def to_arrow(self) -> pa.Table:
        """Columns ``joinid`` int64, ``tokens`` list<int32>, ``values`` list<float32>; no copy."""
        offsets = pa.array(self.indptr.astype(np.int32))
        return pa.table(
            {
                "joinid": pa.array(self.joinids),
                "tokens": pa.ListArray.from_arrays(offsets, pa.array(self.tokens)),
                "values": pa.ListArray.from_arrays(offsets, pa.array(self.values)),
            }
        )

    @classmethod
    def from_arrow(cls, table: pa.Table) -> TokenBlock:
        """Read what :meth:`to_arrow` wrote, also from a slice of it (offsets are rebased)."""
        tokens = table.column("tokens").combine_chunks()
        values = table.column("values").combine_chunks()
        if isinstance(tokens, pa.ChunkedArray):  # no chunk at all: an empty table
            tokens = pa.array([], pa.list_(pa.int32()))
            values = pa.array([], pa.list_(pa.float32()))
        offsets = tokens.offsets.to_numpy().astype(np.int64)
        return cls(
            joinids=table.column("joinid").to_numpy().astype(np.int64, copy=False),
            indptr=offsets - offsets[0],
            tokens=tokens.flatten().to_numpy(),
            values=values.flatten().to_numpy(),
        )
