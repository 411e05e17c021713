"""Balanced sampling: groups of cells (types, tissues) made equally frequent in an epoch.

An epoch keeps its number of cells N. Every group gets the same number of places, but no cell comes
more than ``max_repeats`` times; what small groups cannot fill goes to the others, equally. A cell
of a group comes ``places // cells`` times, and those that come once more are chosen by keyed draws,
others in each epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellray.core.draw import Draw

__all__ = ["Balance", "quotas"]

I64 = npt.NDArray[np.int64]


def quotas(sizes: I64, *, max_repeats: int) -> I64:
    """Places of each group in an epoch.

    Args:
        sizes: (K,) cells of each group.
        max_repeats: how often a cell may come.

    Returns:
        (K,) int64 that sum to ``sizes.sum()``, each at most ``max_repeats`` times its size, and
        equal to within one where that limit does not bind.
    """
    total = int(sizes.sum())
    limits = sizes * max_repeats
    given = np.zeros(len(sizes), dtype=np.int64)
    order = np.argsort(limits, kind="stable")
    left = total
    for done, k in enumerate(order):  # smallest limits first: what they cannot take is passed on
        given[k] = min(int(limits[k]), left // (len(order) - done))
        left -= int(given[k])
    return given


@dataclass(frozen=True, eq=False)
class Balance:
    """Groups that an epoch shows equally often.

    Attributes:
        groups: (N,) group codes 0 .. K-1, aligned with the plan's cells.
        max_repeats: how often a cell may come in an epoch.
    """

    groups: npt.NDArray[np.integer]
    max_repeats: int = 10

    def cells(self, ids: I64, draw: Draw) -> tuple[I64, I64]:
        """The cells of one epoch.

        First come all cells once, in store order, then the second copies of those that have one,
        and so on: copies of a cell lie far apart, while neighbours stay neighbours.

        Args:
            ids: (N,) cell ids.
            draw: the epoch's draws.

        Returns:
            (N,) indices of cells, and (N,) how often each has come before.
        """
        groups = np.asarray(self.groups, dtype=np.int64)
        sizes = np.bincount(groups)
        places = np.zeros_like(sizes)
        filled = sizes > 0
        places[filled] = quotas(sizes[filled], max_repeats=self.max_repeats)
        order = np.lexsort((draw.bits("plan.balance", ids), groups))
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        rank = np.empty(len(ids), dtype=np.int64)
        rank[order] = np.arange(len(ids)) - starts[groups[order]]
        size = np.maximum(sizes, 1)
        copies = (places // size)[groups] + (rank < (places % size)[groups])
        layers = [np.flatnonzero(copies > k) for k in range(int(copies.max(initial=0)))]
        before = np.repeat(np.arange(len(layers)), [len(layer) for layer in layers])
        return np.concatenate(layers).astype(np.int64), before.astype(np.int64)
