"""Exact k nearest neighbours in Euclidean distance, by blocks of cells in bounded memory.

A block of squared distances comes from one matrix product, |x|^2 + |y|^2 - 2 x.y, which is fast but
loses digits where cells are close. It therefore only chooses candidates: every cell whose rounded
distance might be among the k least. Their distances are then computed again from differences, and
ordered by (distance, index). So the answer is exact, ties included, whatever the block size, and
cell i never counts as its own neighbour unless :meth:`Neighbours.with_self` puts it first.

The neighbours are sought among the same cells, or of query cells among reference cells.

Legend: N cells, Q query cells, D dimensions, K neighbours, R rows of a block, Z candidates of a
block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from cellray.core.errors import DataError

__all__ = [
    "Neighbours",
    "centred",
    "finite_matrix",
    "nearest_neighbours",
    "nearest_references",
    "rounding",
    "row_blocks",
    "squared_distances",
]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_BLOCK_BYTES = 32 << 20  # of one block of distances; four such arrays live at a time
_CANDIDATE_BYTES = 32 << 20  # of differences when distances are computed again


@dataclass(frozen=True)
class Neighbours:
    """The nearest other cells of every cell, by (distance, index).

    Shapes:
        indices: (N, K) int64.
        distances: (N, K) float64, not squared, in the units of the embedding.
    """

    indices: I64
    distances: F64

    @property
    def num_cells(self) -> int:
        """N."""
        return len(self.indices)

    @property
    def k(self) -> int:
        """K, neighbours of a cell."""
        return int(self.indices.shape[1])

    def first(self, k: int) -> Neighbours:
        """The k nearest of them.

        Raises:
            DataError: k is more than there are.
        """
        if not 0 <= k <= self.k:
            raise DataError(
                f"{k} neighbours of a cell are asked for, {self.k} were searched; search for more"
            )
        return Neighbours(self.indices[:, :k], self.distances[:, :k])

    def with_self(self) -> Neighbours:
        """The same with each cell as its own first neighbour, at distance 0: K + 1 columns."""
        own = np.arange(self.num_cells, dtype=np.int64)[:, None]
        return Neighbours(
            np.concatenate([own, self.indices], axis=1),
            np.concatenate([np.zeros((self.num_cells, 1)), self.distances], axis=1),
        )

    def graph(self) -> csr_matrix:
        """The directed graph: row i holds 1 at i's neighbours. (N, N), N K entries."""
        starts = np.arange(self.num_cells + 1) * self.k
        flat = self.indices.ravel()
        return csr_matrix((np.ones(flat.size), flat, starts), shape=(self.num_cells,) * 2)


def finite_matrix(embedding: npt.ArrayLike, what: str = "embedding") -> F64:
    """An embedding as float64.

    Args:
        embedding: (N, D).
        what: its name in errors.

    Raises:
        DataError: it is no (N, D) array with N, D >= 1, or holds NaN or infinity.
    """
    points = np.asarray(embedding, dtype=np.float64)
    if points.ndim != 2 or not points.size:
        raise DataError(f"the {what} has shape {points.shape}; give (cells, dimensions)")
    bad = ~np.isfinite(points).all(axis=1)
    if bad.any():
        raise DataError(
            f"the {what} of {int(bad.sum())} of {len(points)} cells holds NaN or infinity (first: "
            f"cell {int(np.argmax(bad))}); find out why before scoring it"
        )
    return points


def row_blocks(num_rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Slices of rows, each of at most 32 MiB (one row at least)."""
    step = max(1, _BLOCK_BYTES // max(1, bytes_per_row))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _exact(left: F64, right: F64, rows: I64, columns: I64) -> F64:
    """Distances of Z pairs (left row, right column) from their differences, bounded at a time."""
    found = np.empty(len(rows), dtype=np.float64)
    step = max(1, _CANDIDATE_BYTES // (8 * max(1, left.shape[1])))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        difference = left[rows[part]] - right[columns[part]]
        found[part] = np.sqrt(np.einsum("ij,ij->i", difference, difference))
    return found


def centred(embedding: F64) -> tuple[F64, F64]:
    """The cells about their mean, which keeps rounding errors small, and their squared norms.

    Shapes:
        embedding: (N, D); returned (N, D) and (N,).
    """
    points = embedding - embedding.mean(axis=0)
    return points, np.einsum("ij,ij->i", points, points)


def rounding(num_dimensions: int) -> float:
    """C: the error of a rounded squared distance is below C (|x| + |y|)^2."""
    return float((num_dimensions + 8) * np.finfo(np.float64).eps)


def squared_distances(points: F64, squares: F64, rows: slice) -> F64:
    """Rounded squared distances |x|^2 + |y|^2 - 2 x.y of a block's cells to all cells.

    Args:
        points: (N, D) from :func:`centred`.
        squares: (N,) from :func:`centred`.
        rows: the block.

    Returns:
        (R, N); see :func:`rounding` for its error.
    """
    rough = points[rows] @ points.T
    rough *= -2.0
    rough += squares[None, :]
    rough += squares[rows, None]
    return rough


def _limit(kth: F64, squares: F64, error: float) -> F64:
    """No true neighbour's rounded squared distance is above this. (R,).

    A cell y within d of x has |y| <= |x| + d, so far cells do not matter, however far. Let r be the
    kth least rounded square. The k cells there have d^2 <= r + C (2|x| + d)^2, so the kth least
    true square is at most m = (r + 8 C |x|^2) / (1 - 2 C), and whatever lies within it is rounded
    to at most m + C (2|x| + sqrt(m))^2.

    Args:
        kth: (R,) r, or something above it.
        squares: (R,) |x|^2.
        error: C.
    """
    most = (np.maximum(kth, 0.0) + 8.0 * error * squares) / (1.0 - 2.0 * error)
    limit: F64 = most + error * (2.0 * np.sqrt(squares) + np.sqrt(most)) ** 2
    return limit


def _candidates(rough: F64, squares: F64, error: float, k: int) -> tuple[I64, I64]:
    """Rows and columns of every entry that might be a true neighbour.

    The kth least of a sample of columns bounds the kth least of all from above; what is not above
    that bound is little, so a row is partitioned in about sqrt(N K) entries instead of N.
    """
    width = rough.shape[1]
    stride = max(1, int(np.sqrt(width / k)))
    sample = rough[:, ::stride]
    bound = _limit(np.partition(sample, k - 1, axis=1)[:, k - 1], squares, error)
    flat = np.flatnonzero(rough <= bound[:, None])
    line = flat // width
    counts = np.bincount(line, minlength=len(rough))
    place = np.arange(len(flat)) - (np.cumsum(counts) - counts)[line]
    values = rough.ravel()[flat]
    packed = np.full((len(rough), int(counts.max())), np.inf)
    packed[line, place] = values
    bound = _limit(np.partition(packed, k - 1, axis=1)[:, k - 1], squares, error)
    kept = values <= bound[line]
    return line[kept], flat[kept] - line[kept] * width


def _least(rough: F64, asked: F64, points: F64, squares: F64, k: int) -> tuple[I64, F64]:
    """(R, K) neighbours and exact distances of one block, by (distance, index).

    Args:
        rough: (R, N) rounded squared distances; infinite where a pair does not count.
        asked: (R, D) the block's cells.
        points: (N, D) the cells sought among.
        squares: (R,) squared norms of the block's cells about the mean of ``points``.
        k: K.
    """
    line, column = _candidates(rough, squares, rounding(points.shape[1]), k)
    distance = _exact(asked, points, line, column)
    order = np.lexsort((column, distance, line))
    counts = np.bincount(line, minlength=len(asked))
    starts = np.cumsum(counts) - counts
    picked = order[starts[:, None] + np.arange(k)[None, :]]
    return column[picked], distance[picked]


def nearest_neighbours(embedding: npt.ArrayLike, k: int) -> Neighbours:
    """The k nearest other cells of each cell, exactly.

    Time grows as N^2 (D + constant), memory as N (D + K) plus 128 MiB. Many duplicates of a cell
    are many candidates and cost time, never exactness.

    Args:
        embedding: (N, D) finite numbers.
        k: neighbours of a cell, the cell itself not counted; 1 to N - 1.

    Raises:
        DataError: the embedding is no finite (N, D) array, or k is outside 1..N-1.
    """
    points = finite_matrix(embedding)
    num_cells = len(points)
    if not 1 <= k < num_cells:
        raise DataError(
            f"k = {k} neighbours among {num_cells} cells; k must be 1 to {num_cells - 1}"
        )
    about = centred(points)
    indices = np.empty((num_cells, k), dtype=np.int64)
    distances = np.empty((num_cells, k), dtype=np.float64)
    for rows in row_blocks(num_cells, 8 * num_cells):
        rough = squared_distances(*about, rows)
        own = np.arange(rows.start, rows.stop)
        rough[np.arange(len(own)), own] = np.inf
        indices[rows], distances[rows] = _least(rough, points[rows], points, about[1][rows], k)
    return Neighbours(indices, distances)


def nearest_references(reference: npt.ArrayLike, query: npt.ArrayLike, k: int) -> Neighbours:
    """The k nearest reference cells of each query cell, exactly; a tie goes to the lower row.

    The answer for a query cell does not depend on the other query cells. Time grows as Q N (D +
    constant), memory as (Q + N) D + Q K plus 128 MiB.

    Args:
        reference: (N, D) finite numbers.
        query: (Q, D) finite numbers; a query cell that equals a reference cell finds it at 0.
        k: reference cells of a query cell, 1 to N.

    Returns:
        (Q, K) rows of the reference, and distances.

    Raises:
        DataError: an embedding is no finite array of cells by dimensions, the two differ in their
            dimensions, or k is outside 1..N.
    """
    points = finite_matrix(reference, "reference embedding")
    asked = finite_matrix(query, "query embedding")
    if asked.shape[1] != points.shape[1]:
        raise DataError(
            f"the query embedding has {asked.shape[1]} dimensions, the reference has "
            f"{points.shape[1]}; embed both with the same model"
        )
    if not 1 <= k <= len(points):
        raise DataError(
            f"k = {k} neighbours among {len(points)} reference cells; k must be 1 to {len(points)}"
        )
    mean = points.mean(axis=0)
    about, around = points - mean, asked - mean
    squares = np.einsum("ij,ij->i", about, about)
    norms = np.einsum("ij,ij->i", around, around)
    indices = np.empty((len(asked), k), dtype=np.int64)
    distances = np.empty((len(asked), k), dtype=np.float64)
    for rows in row_blocks(len(asked), 8 * len(points)):
        rough = around[rows] @ about.T
        rough *= -2.0
        rough += squares[None, :]
        rough += norms[rows, None]
        indices[rows], distances[rows] = _least(rough, asked[rows], points, norms[rows], k)
    return Neighbours(indices, distances)
