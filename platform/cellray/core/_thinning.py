"""Binomial draws from given uniforms, compiled on first use: lower read depth by keyed draws."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["thin"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
# Larger counts are drawn as a sum: q^n must not underflow, and a draw takes n * p steps.
_CHUNK = 512


@njit(cache=True)  # type: ignore[untyped-decorator]
def _unit(bits: np.uint64) -> float:
    return np.float64(bits >> np.uint64(11)) * 2.0**-53


@njit(cache=True)  # type: ignore[untyped-decorator]
def _mix(x: np.uint64) -> np.uint64:
    z = x + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


@njit(cache=True)  # type: ignore[untyped-decorator]
def _inverse(n: int, p: float, u: float) -> int:
    """The smallest k with P(Binomial(n, p) <= k) > u, for p <= 1/2 and n <= _CHUNK."""
    q = 1.0 - p
    mass = q**n
    total = mass
    k = 0
    while total <= u and k < n:
        mass *= (n - k) / (k + 1.0) * (p / q)
        total += mass
        k += 1
    return k


@njit(cache=True)  # type: ignore[untyped-decorator]
def thin(
    counts: npt.NDArray[np.int64], shares: npt.NDArray[np.float64], bits: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """(Z,) binomial draws: how many of ``counts`` are kept, each with its probability.

    Args:
        counts: (Z,) >= 0.
        shares: (Z,) probabilities, 0..1.
        bits: (Z,) 64 random bits for each.
    """
    kept = np.zeros(len(counts), np.int64)
    for i in range(len(counts)):
        left, p, state = counts[i], shares[i], bits[i]
        if p >= 1.0:
            kept[i] = left
            continue
        smaller = min(p, 1.0 - p)
        found = 0
        while left > 0:
            n = min(left, _CHUNK)
            found += _inverse(n, smaller, _unit(state))
            state = _mix(state)
            left -= n
        kept[i] = found if p <= 0.5 else counts[i] - found
    return kept
