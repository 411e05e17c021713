"""Raw counts out of a matrix that may have been normalised: taken, or recovered exactly, or not.

A cell's values are taken as they are if they are whole. Otherwise three transforms are undone, and
the result is believed only if every value of the cell comes out whole:

    log1p        x = log_b(1 + s c), b = e or 2, with one unknown factor s a cell. s c is a
                 multiple of s for every count c, so the smallest value, or a fraction of it, is s.
    UMI          x = -K ln(1 - c / K), the correction for colliding barcodes of 4 bases, K = 256
                 (Gruen et al. 2014, doi:10.1038/nmeth.2930), as CEL-seq counts are published.

Counts whose common divisor is above 1 in a cell come out divided by it: s is the largest factor of
which all values are multiples. This needs a cell in which no gene has a single count.

Legend: N cells, G genes, Z stored values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

__all__ = ["COUNTS", "Recovered", "recover_counts"]

F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

COUNTS = "counts"
_DIVISORS = 12  # the smallest count of a cell may be that large
_UMI_BARCODES = 256.0
_SAMPLE = 500  # cells
# float32 keeps log1p values to 6e-8 of themselves; expm1 of one near 8 to about 1e-6
_RELATIVE, _ABSOLUTE, _HOPELESS = 4e-6, 1e-4, 0.1


@dataclass(frozen=True)
class Recovered:
    """What became of a matrix.

    Attributes:
        counts: whole counts; cells that are not exact hold nothing.
        exact: cells whose counts are known.
        how: ``counts`` or the transform that was undone -> cells.

    Shapes:
        counts: (N, G) float32 csr.
        exact: (N,) bool.
    """

    counts: sparse.csr_matrix
    exact: Bools
    how: Mapping[str, int]


def _each(indptr: npt.NDArray[np.integer], values: Bools) -> Bools:
    """Whether all values of a row are true; so for a row without any."""
    bad = np.zeros(len(indptr) - 1, dtype=np.int64)
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    np.add.at(bad, rows, ~values)
    return np.asarray(bad == 0)


def _whole(values: F64) -> Bools:
    """Which values are whole within the precision that a float32 of their size has left."""
    allowed = _ABSOLUTE + _RELATIVE * values
    return (np.abs(values - np.rint(values)) <= allowed) & (allowed < _HOPELESS) & (values > 0.5)


def _undo_log(matrix: sparse.csr_matrix, base: float) -> tuple[F64, Bools]:
    """Counts (Z,) if the cells are log1p-normalised, and which cells came out whole."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.expm1(matrix.data.astype(np.float64) * np.log(base))
    lengths = np.diff(matrix.indptr)
    filled = np.flatnonzero(lengths)
    least = np.ones(len(lengths))
    if len(filled):
        least[filled] = np.minimum.reduceat(values, matrix.indptr[filled])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = values / np.repeat(least, lengths)
    counts, done = np.zeros_like(ratios), np.zeros(len(lengths), dtype=bool)
    positive = np.isfinite(ratios) & (np.repeat(least, lengths) > 0)
    for divisor in range(1, _DIVISORS + 1):
        scaled = np.where(positive, ratios, 0.0) * divisor
        now = _each(matrix.indptr, positive & _whole(scaled)) & ~done
        taken = np.repeat(now, lengths)
        counts[taken] = np.rint(scaled[taken])
        done |= now
        if done.all():
            break
    return counts, done


def _undo_umi(matrix: sparse.csr_matrix) -> tuple[F64, Bools]:
    """Counts (Z,) if barcode collisions were corrected for, and which cells came out whole."""
    values = matrix.data.astype(np.float64)
    counts = -_UMI_BARCODES * np.expm1(-np.maximum(values, 0.0) / _UMI_BARCODES)
    return np.rint(counts), _each(matrix.indptr, (values > 0) & _whole(counts))


def _undo_nothing(matrix: sparse.csr_matrix) -> tuple[F64, Bools]:
    values = matrix.data.astype(np.float64)
    return values, _each(matrix.indptr, (values >= 0) & (values == np.floor(values)))


_WAYS: Mapping[str, Callable[[sparse.csr_matrix], tuple[F64, Bools]]] = {
    COUNTS: _undo_nothing,
    "log1p (base e)": lambda matrix: _undo_log(matrix, np.e),
    "log1p (base 2)": lambda matrix: _undo_log(matrix, 2.0),
    "UMI correction (K = 256)": _undo_umi,
}


def _by_frequency(matrix: sparse.csr_matrix) -> list[str]:
    """The ways, that which explains most of a sample of cells first: it is not left to chance."""
    sample = matrix[:: max(1, matrix.shape[0] // _SAMPLE)]
    good = {name: int(undo(sample)[1].sum()) for name, undo in _WAYS.items()}
    return sorted(_WAYS, key=lambda name: -good[name])


def recover_counts(matrix: sparse.csr_matrix) -> Recovered:
    """Raw counts of each cell, where they can be known exactly.

    A cell with a single value gives no evidence of a transform: unless that value is whole, its
    counts stay unknown.

    Args:
        matrix: (N, G) values as published; explicit zeros are dropped.
    """
    left = sparse.csr_matrix(matrix, dtype=np.float64, copy=True)
    left.eliminate_zeros()
    lengths = np.diff(left.indptr)
    found = np.zeros(len(left.data))
    exact = np.zeros(left.shape[0], dtype=bool)
    how: Counter[str] = Counter()
    for name in _by_frequency(left):
        undo = _WAYS[name]
        rows = np.flatnonzero(~exact & ((lengths > 1) | (name == COUNTS)))
        if not len(rows):
            continue
        counts, whole = undo(left[rows])
        taken = np.zeros(left.shape[0], dtype=bool)
        taken[rows[whole]] = True
        found[np.repeat(taken, lengths)] = counts[np.repeat(whole, lengths[rows])]
        exact |= taken
        how[name] += int(whole.sum())
    parts = (found.astype(np.float32), left.indices, left.indptr)
    result = sparse.csr_matrix(parts, shape=left.shape)
    result.eliminate_zeros()
    return Recovered(result, exact, {name: n for name, n in how.items() if n})
