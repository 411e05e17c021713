"""Cell ids: one int64 that says which store, which row of it, and which time it is seen.

    bits 0..39   the SOMA joinid within its store
    bits 40..51  the number of the store among those a run reads, 0 for the first or only one
    bits 52..62  how often the cell has come before: balanced sampling, passes of a mixture

With one store and no repeats a cell id is the joinid itself. Draws are keyed by the whole id, so a
cell that comes twice in an epoch is masked and sampled anew each time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_REPEATS", "MAX_STORES", "cell_ids", "joinids_of", "stores_of", "without_repeats"]

I64 = npt.NDArray[np.int64]

_JOINID_BITS = 40
_STORE_BITS = 12
_REPEAT_BITS = 11
_JOINID_MASK = np.int64((1 << _JOINID_BITS) - 1)
_CELL_MASK = np.int64((1 << (_JOINID_BITS + _STORE_BITS)) - 1)
MAX_STORES = 1 << _STORE_BITS
MAX_REPEATS = 1 << _REPEAT_BITS


def cell_ids(joinids: npt.ArrayLike, *, store: int = 0, repeats: npt.ArrayLike = 0) -> I64:
    """Put ids together; arguments broadcast.

    Args:
        joinids: rows within the store, or ids without repeats.
        store: number of the store, below 4,096.
        repeats: how often the cell has come before, below 2,048.
    """
    high = np.asarray(repeats, dtype=np.int64) << np.int64(_JOINID_BITS + _STORE_BITS)
    ids: I64 = np.asarray(joinids, dtype=np.int64) | np.int64(store << _JOINID_BITS) | high
    return ids


def joinids_of(ids: I64) -> I64:
    """The joinids within their stores."""
    found: I64 = ids & _JOINID_MASK
    return found


def stores_of(ids: I64) -> I64:
    """The number of each cell's store."""
    found: I64 = (ids & _CELL_MASK) >> np.int64(_JOINID_BITS)
    return found


def without_repeats(ids: I64) -> I64:
    """The ids of the cells, however often they come."""
    found: I64 = ids & _CELL_MASK
    return found
