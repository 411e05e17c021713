"""Log-normalised values of non-zero counts, shared by the tokenizers of fixed gene panels.

Legend: N cells of a block, Z non-zero counts, T tokens of the block.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from cellray.core.blocks import CellBlock, TokenBlock, row_ids
from cellray.core.draw import Draw
from cellray.core.errors import DataError
from cellray.data.vocab import Vocab

__all__ = ["TARGET_SUM", "Library", "keep_sample", "lay_tokens", "normalised", "totals"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

TARGET_SUM = 10_000.0
Library = Literal["panel", "all"]


def totals(block: CellBlock, library: Library) -> npt.NDArray[np.float64]:
    """(N,) total counts: over the vocabulary's genes (``panel``) or over all of the store.

    Raises:
        DataError: a cell has counts but a library size that is not above 0.
    """
    if library == "all":
        sizes = block.library_sizes.astype(np.float64)
        wrong = (np.diff(block.indptr) > 0) & ~(sizes > 0)
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"cell {block.joinids[first]} has counts but a library size of {sizes[first]}; the "
                "library size is the sum over all genes and must be above 0: ingest the store "
                "again from raw counts"
            )
        return sizes
    rows = row_ids(block.indptr)
    return np.bincount(rows, weights=block.counts, minlength=len(block)).astype(np.float64)


def normalised(block: CellBlock, sums: npt.NDArray[np.float64]) -> F32:
    """(Z,) float32 counts scaled so that a cell of total ``sums`` (N,) has 10,000."""
    divisors = (np.where(sums > 0, sums, 1.0) / TARGET_SUM).astype(np.float32)
    each = np.repeat(divisors, np.diff(block.indptr))
    return np.asarray(block.counts / each, dtype=np.float32)


def keep_sample(
    block: CellBlock, vocab: Vocab, draw: Draw, *, stream: str, most: int
) -> BoolArray | None:
    """(Z,) True at genes that stay when no cell may keep more than ``most``; None if all stay.

    Longer cells keep a sample without replacement, keyed by (seed, epoch, cell, gene token).
    """
    lengths = np.diff(block.indptr)
    long = lengths > most
    if not long.any():
        return None
    keep = np.repeat(~long, lengths)
    places = np.flatnonzero(~keep)
    rows = row_ids(block.indptr)[places]
    keys = draw.bits(stream, block.joinids[rows], vocab.gene_tokens[block.genes[places]])
    order = np.lexsort((keys, rows))
    starts = np.cumsum(lengths[long]) - lengths[long]
    rank = np.arange(len(places)) - np.repeat(starts, lengths[long])
    keep[places[order[rank < most]]] = True
    return keep


def lay_tokens(
    block: CellBlock,
    tokens: npt.NDArray[np.int32],
    values: F32,
    keep: BoolArray | None,
) -> TokenBlock:
    """A token block of (Z,) tokens and values, without those that ``keep`` drops."""
    if keep is None:
        return TokenBlock(block.joinids, block.indptr.astype(np.int64), tokens, values)
    kept = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(keep, dtype=np.int64)])
    return TokenBlock(block.joinids, kept[block.indptr], tokens[keep], values[keep])
