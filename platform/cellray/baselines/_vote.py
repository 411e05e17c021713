"""The neighbour vote: how any embedding becomes labels, the same for every method of a table.

Legend: N reference cells, Q query cells, D dimensions, K neighbours, C classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cellray.core.voting import vote
from cellray.metrics.neighbours import nearest_references

__all__ = ["NUM_NEIGHBORS", "neighbour_vote"]

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

NUM_NEIGHBORS = 15


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
    return vote(labels[found.indices])
