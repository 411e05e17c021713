"""A checksum as fast as memory: it finds damage, it is not proof against intent."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

__all__ = ["mix_words"]

_PRIME = 0x9E3779B97F4A7C15


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _mix(words: npt.NDArray[Any], state: np.uint64) -> np.uint64:
    a, b, c, d = state, state ^ np.uint64(1), state ^ np.uint64(2), state ^ np.uint64(3)
    prime = np.uint64(_PRIME)
    n = len(words) // 4 * 4
    for i in range(0, n, 4):  # four chains, so that multiplications overlap
        a = (a ^ words[i]) * prime
        b = (b ^ words[i + 1]) * prime
        c = (c ^ words[i + 2]) * prime
        d = (d ^ words[i + 3]) * prime
    for i in range(n, len(words)):
        a = (a ^ words[i]) * prime
    high = np.uint64(29)
    a ^= a >> high
    for other in (b, c, d):
        a = (a ^ other ^ (other >> high)) * prime
    return a ^ (a >> np.uint64(32))


def mix_words(words: npt.NDArray[np.uint64], state: np.uint64) -> np.uint64:
    """Mix 8-byte words into a state; any changed, missing or moved word gives another result."""
    return np.uint64(_mix(words, state))
