"""Cells in motion before the model: raw counts as compressed rows, then ragged tokens.

Legend: N cells in a block, Z non-zero counts of the block, T tokens of the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["CellBlock", "TokenBlock", "join_blocks", "lay_out", "row_ids"]

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
        indptr, genes, counts = _take(self.indptr, rows, self.genes, self.counts)
        return CellBlock(
            joinids=self.joinids[rows],
            indptr=indptr,
            genes=genes,
            counts=counts,
            library_sizes=self.library_sizes[rows],
            obs={name: column[rows] for name, column in self.obs.items()},
        )


def _take(
    indptr: I64, rows: npt.NDArray[np.integer], *flat: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], ...]:
    """Offsets and flat arrays of the given rows, in their order."""
    from cellray.core._gather import copy_rows  # compiled on first use

    starts, lengths = indptr[:-1][rows], np.diff(indptr)[rows]
    offsets = _offsets([lengths])
    taken = [np.empty(offsets[-1], dtype=array.dtype) for array in flat]
    for source, out in zip(flat, taken, strict=True):
        copy_rows(source, starts, lengths, out, offsets[:-1])
    return (offsets, *taken)


def _offsets(lengths: Sequence[I64]) -> I64:
    """Offsets of rows laid end to end."""
    indptr = np.zeros(sum(len(part) for part in lengths) + 1, dtype=np.int64)
    if lengths:
        np.cumsum(np.concatenate(lengths), out=indptr[1:])
    return indptr


def join_blocks(blocks: Sequence[CellBlock], *, joinids: I64) -> CellBlock:
    """Blocks laid end to end as one.

    Args:
        blocks: at least one, all with the same obs columns.
        joinids: (N,) the ids of all their cells.
    """
    if len(blocks) == 1:
        return replace(blocks[0], joinids=joinids)
    return CellBlock(
        joinids=joinids,
        indptr=_offsets([np.diff(b.indptr) for b in blocks]),
        genes=np.concatenate([b.genes for b in blocks]),
        counts=np.concatenate([b.counts for b in blocks]),
        library_sizes=np.concatenate([b.library_sizes for b in blocks]),
        obs={name: np.concatenate([b.obs[name] for b in blocks]) for name in blocks[0].obs},
    )


def lay_out(parts: Sequence[tuple[I64, TokenBlock]], *, joinids: I64) -> TokenBlock:
    """Put the cells of several token blocks where they belong.

    Args:
        parts: (places, block) each: the i-th cell of the block becomes cell ``places[i]``; all
            blocks have tokens and values of the same types.
        joinids: (N,) the ids of the cells in their new order.
    """
    from cellray.core._gather import copy_rows

    if not parts:
        nothing = np.zeros(0, dtype=np.int32)
        indptr = np.zeros(len(joinids) + 1, dtype=np.int64)
        return TokenBlock(joinids, indptr, nothing, nothing.astype(np.float32))
    lengths = np.zeros(len(joinids), dtype=np.int64)
    for places, block in parts:
        lengths[places] = np.diff(block.indptr)
    indptr = _offsets([lengths])
    first = parts[0][1]
    tokens = np.empty(indptr[-1], dtype=first.tokens.dtype)
    values = np.empty(indptr[-1], dtype=first.values.dtype)
    for places, block in parts:
        starts, where = block.indptr[:-1], indptr[:-1][places]
        for source, out in ((block.tokens, tokens), (block.values, values)):
            copy_rows(source, starts, lengths[places], out, where)
    return TokenBlock(joinids=joinids, indptr=indptr, tokens=tokens, values=values)


@dataclass(frozen=True)
class TokenBlock:
    """N tokenised cells, laid end to end.

    Shapes:
        joinids: (N,) int64.
        indptr: (N+1,) int64 offsets into ``tokens`` and ``values``.
        tokens: (T,) token ids (specials included), of any integer type: tokenizers give int32,
            the token cache the narrowest type that holds the vocabulary.
        values: (T,) what accompanies each token (a bin, a rank value), float32 or a narrow
            integer; a family's tokenizer says what it means.
    """

    joinids: I64
    indptr: I64
    tokens: npt.NDArray[np.integer]
    values: npt.NDArray[np.number]

    def __len__(self) -> int:
        return len(self.joinids)

    def take(self, rows: npt.NDArray[np.integer]) -> TokenBlock:
        """The cells at ``rows`` (positions within this block), in that order."""
        return TokenBlock(self.joinids[rows], *_take(self.indptr, rows, self.tokens, self.values))

    def slice(self, first: int, last: int) -> TokenBlock:
        """The cells ``first .. last`` (exclusive); shares memory."""
        begin, end = self.indptr[first], self.indptr[last]
        return TokenBlock(
            joinids=self.joinids[first:last],
            indptr=self.indptr[first : last + 1] - begin,
            tokens=self.tokens[begin:end],
            values=self.values[begin:end],
        )

    def to_arrow(self) -> pa.Table:
        """Columns ``joinid`` int64, ``tokens`` list<integer>, ``values`` list<number>; no copy."""
        assert self.indptr[-1] < 1 << 31, "a token block holds fewer than 2^31 tokens"
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
