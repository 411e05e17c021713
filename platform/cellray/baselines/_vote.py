"""The neighbour vote: how any embedding becomes labels, the same for every method of a table.

Legend: N reference cells, Q query cells, D dimensions, K neighbours, C classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cellray.metrics.neighbours import nearest_references

__all__ = ["NUM_NEIGHBORS", "count_votes", "neighbour_vote"]

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

NUM_NEIGHBORS = 15


def count_votes(labels: I64) -> tuple[I64, F64]:
    """Winner of each row of neighbours' codes, nearest first, and its share of the votes.

    A tie goes to the class of the nearest among the tied.

    Args:
        labels: (Q, K) codes, K >= 1.

    Returns:
        (Q,) codes and (Q,) shares in (0, 1].
    """
    num, k = labels.shape
    shape = (num, int(labels.max(initial=0)) + 1)
    where = (np.repeat(np.arange(num), k), labels.ravel())
    votes = np.zeros(shape, dtype=np.int64)
    np.add.at(votes, where, 1)
    nearest = np.full(shape, k, dtype=np.int64)
    np.minimum.at(nearest, where, np.tile(np.arange(k), num))
    # one vote more outweighs any nearness, which therefore decides between ties only
    winners = (votes * (k + 1) - nearest).argmax(axis=1).astype(np.int64)
    return winners, votes[np.arange(num), winners] / k


def neighbour_vote(
    reference: npt.ArrayLike, labels: I64, query: npt.ArrayLike, k: int = NUM_NEIGHBORS
) -> tuple[I64, F64]:
    """Labels of query cells by one vote each of their nearest reference cells (L2, exact).

    Args:
        reference: (N, D) embedding of the labelled cells.
        labels: (N,) codes.
        query: (Q, D), Q >= 1.
        k: voters; all reference cells if there are fewer.

    Returns:
        (Q,) codes and (Q,) confidence: the winner's share of the votes.

    Raises:
        DataError: the embeddings are not finite or differ in their dimensions.
    """
    found = nearest_references(reference, query, min(k, len(labels)))
    return count_votes(labels[found.indices])
