"""The vote of nearest neighbours: a majority, its share, and ties to the nearest.

Legend: N cells, K neighbours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["vote"]

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

_BLOCK_BYTES = 32 << 20  # of one block of (rows, K, K) comparisons


def vote(codes_NK: npt.NDArray[np.integer]) -> tuple[I64, F64]:
    """The class that most neighbours have; among classes with as many votes, the nearest one's.

    Args:
        codes_NK: (N, K) class codes of each cell's neighbours, nearest first, K >= 1.

    Returns:
        (N,) the winner's code, and (N,) its share of the K votes, 1/K..1.
    """
    num, k = codes_NK.shape
    winners, shares = np.empty(num, dtype=np.int64), np.empty(num, dtype=np.float64)
    step = max(1, _BLOCK_BYTES // (k * k))
    for start in range(0, num, step):
        part = codes_NK[start : start + step]
        votes = (part[:, :, None] == part[:, None, :]).sum(axis=2)  # of each neighbour's class
        first = votes.argmax(axis=1)  # the first of the greatest, and the nearest stand first
        rows = np.arange(len(part))
        winners[start : start + step] = part[rows, first]
        shares[start : start + step] = votes[rows, first] / k
    return winners, shares
