"""Compiled loops that draw the counts of synthetic cells; each is a pure function of its keys.

Counts are exactly negative binomial without a draw for every gene. A negative binomial of mean m
and dispersion phi is a Poisson number of clusters, of rate ln(1 + phi m) / phi, whose sizes are
logarithmic with p = phi m / (1 + phi m) (Quenouille 1949, doi:10.2307/3001776). Cells therefore
draw Poisson(library size) genes from an alias table (Walker 1977, doi:10.1145/355744.355749),
keep each with the ratio of the two rates, ln(1 + x) / x with x = phi m, and give it a size: work
in proportion to the counts, not to the genes. Only genes whose rate differs from cell to cell
(regulators, targets, pathways) are drawn one by one.

Legend: N cells, V genes, G groups of cells that share static rates, D dynamic genes, S states
(activities of regulators and pathways), E loadings, Z counts written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

__all__ = ["alias_table", "draw_cells", "hash_cells"]

F = TypeVar("F", bound=Callable[..., Any])
Array = np.ndarray[Any, Any]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_TO_UNIT = 2.0**-53
_TO_UNIT_32 = 2.0**-32
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT = np.zeros(64, np.int64)
for _position in range(64):
    _BIT[((0x03F79D71B4CB0A89 << _position) & (2**64 - 1)) >> 58] = _position
_SMALL_MEAN = 12.0  # below it a Poisson draw is inverted, above it rejected from a hat


def _kernel(function: F) -> F:
    compiled: F = numba.njit(cache=True, nogil=True)(function)
    return compiled


@_kernel
def _splitmix(z: Any) -> Any:
    z += _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


@_kernel
def _next(state: Array) -> Any:
    """64 random bits of a cell's own SplitMix64 sequence; ``state`` is (1,) uint64."""
    z = state[0]
    state[0] = z + _GOLDEN
    return _splitmix(z)


@_kernel
def _uniform(state: Array) -> float:
    """In (0, 1)."""
    return (float(_next(state) >> np.uint64(11)) + 0.5) * _TO_UNIT


@_kernel
def _normal(state: Array) -> float:
    """Standard normal, by Box and Muller."""
    radius = math.sqrt(-2.0 * math.log(_uniform(state)))
    return radius * math.cos(2.0 * math.pi * _uniform(state))


@_kernel
def _poisson_inverted(mean: float, state: Array) -> int:
    u = _uniform(state)
    if u < 1.0 - mean:  # e^-m >= 1 - m: most rare genes end here
        return 0
    p = math.exp(-mean)
    total = p
    k = 0
    while u > total and k < 200:
        k += 1
        p *= mean / k
        total += p
    return k


@_kernel
def _poisson(mean: float, state: Array) -> int:
    """A Poisson draw: by inversion, or by Hörmann's PTRS (doi:10.1016/0167-6687(93)90997-4)."""
    if mean <= 0.0:
        return 0
    if mean < _SMALL_MEAN:
        return _poisson_inverted(mean, state)
    b = 0.931 + 2.53 * math.sqrt(mean)
    a = -0.059 + 0.02483 * b
    inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
    v_r = 0.9277 - 3.6224 / (b - 2.0)
    log_mean = math.log(mean)
    while True:
        u = _uniform(state) - 0.5
        v = _uniform(state)
        us = 0.5 - abs(u)
        k = math.floor((2.0 * a / us + b) * u + mean + 0.43)
        if us >= 0.07 and v <= v_r:
            return int(k)
        if k < 0 or (us < 0.013 and v > us):
            continue
        left = math.log(v) + math.log(inverse_alpha) - math.log(a / (us * us) + b)
        if left <= -mean + k * log_mean - math.lgamma(k + 1.0):
            return int(k)


@_kernel
def _cluster(x: float, v: float, state: Array) -> int:
    """Size of a cluster, logarithmic with p = x / (1 + x); ``v`` uniform (Kemp's LK, 1981)."""
    p = x / (1.0 + x)
    if v >= p:
        return 1
    q = -math.expm1(-math.log1p(x) * _uniform(state))
    if v <= q * q:
        return math.floor(1.0 + math.log(v) / math.log(q))
    return 1 if v >= q else 2


@_kernel
def _negative_binomial(mean: float, dispersion: float, state: Array) -> int:
    if mean <= 0.0:
        return 0
    if dispersion <= 0.0:
        return _poisson(mean, state)
    x = mean * dispersion
    total = 0
    for _ in range(_poisson(math.log1p(x) / dispersion, state)):
        total += _cluster(x, _uniform(state), state)
    return total


@_kernel
def alias_table(rates: Array, threshold: Array, other: Array) -> None:
    """Fill an alias table: column j stands for j below ``threshold[j]``, else for ``other[j]``.

    Args:
        rates: (V,) float64 >= 0 with a positive sum.
        threshold: (V,) uint32, written: of a 32-bit draw.
        other: (V,) int32, written.
    """
    size = len(rates)
    mean = rates.sum() / size
    scaled = np.empty(size)
    small = np.empty(size, np.int32)
    large = np.empty(size, np.int32)
    num_small = 0
    num_large = 0
    for j in range(size):
        scaled[j] = rates[j] / mean
        if scaled[j] < 1.0:
            small[num_small] = j
            num_small += 1
        else:
            large[num_large] = j
            num_large += 1
    while num_small and num_large:
        num_small -= 1
        low = small[num_small]
        high = large[num_large - 1]
        threshold[low] = np.uint32(scaled[low] * 4294967295.0)
        other[low] = high
        scaled[high] -= 1.0 - scaled[low]
        if scaled[high] < 1.0:
            num_large -= 1
            small[num_small] = high
            num_small += 1
    for i in range(num_large):
        threshold[large[i]] = np.uint32(4294967295)
        other[large[i]] = large[i]
    for i in range(num_small):  # left over by rounding
        threshold[small[i]] = np.uint32(4294967295)
        other[small[i]] = small[i]


@_kernel
def _draw_static(
    library: float,
    mass: float,
    rates: Array,
    threshold: Array,
    other: Array,
    dispersion: float,
    state: Array,
    counts: Array,
    seen: Array,
) -> None:
    """Add a cell's counts of the genes whose rate its group shares."""
    size = np.uint64(len(threshold))
    for _ in range(_poisson(library * mass, state)):
        bits = _next(state)
        gene = ((bits >> np.uint64(32)) * size) >> np.uint64(32)
        if np.uint32(bits & np.uint64(0xFFFFFFFF)) >= threshold[gene]:
            gene = np.uint64(other[gene])
        amount = 1
        x = library * rates[gene] * dispersion
        if x > 1e-9:
            bits = _next(state)
            u = float(bits >> np.uint64(32)) * _TO_UNIT_32
            # ln(1 + x) / x >= 1 - x / 2: the logarithm is seldom needed
            if u >= 1.0 - 0.5 * x and u * x >= math.log1p(x):
                continue
            v = (float(bits & np.uint64(0xFFFFFFFF)) + 0.5) * _TO_UNIT_32
            amount = _cluster(x, v, state)
        counts[gene] += amount
        seen[gene >> np.uint64(6)] |= np.uint64(1) << (gene & np.uint64(63))


@_kernel
def _draw_dynamic(
    library: float,
    rates: Array,
    genes: Array,
    pointers: Array,
    sources: Array,
    weights: Array,
    activity: Array,
    dispersion: float,
    state: Array,
    counts: Array,
    seen: Array,
) -> None:
    """Add a cell's counts of the genes whose rate follows its activities."""
    for d in range(len(genes)):
        log_ratio = 0.0
        for e in range(pointers[d], pointers[d + 1]):
            log_ratio += weights[e] * activity[sources[e]]
        gene = genes[d]
        mean = library * rates[gene] * math.exp(log_ratio)
        amount = _negative_binomial(mean, dispersion, state)
        if amount:
            counts[gene] += amount
            seen[gene >> 6] |= np.uint64(1) << np.uint64(gene & 63)


@_kernel
def _activities(
    means: Array, shift: float, knocked: int, num_regulators: int, noise: Array, state: Array,
    activity: Array,
) -> None:  # fmt: skip
    """Draw a cell's activities: normal about their means, those of regulators not below 0.

    ``activity`` (S,) receives, for K regulators and P pathways, K activities less 1 (what edges
    weigh), K logarithms of activities (what the regulator's own rate follows), P levels.
    """
    for k in range(num_regulators):
        level = max(0.0, means[k] * (1.0 + noise[0] * _normal(state)))
        activity[k] = level - 1.0
        activity[num_regulators + k] = math.log(level) if level > 0.0 else -math.inf
    for s in range(2 * num_regulators, len(activity)):
        activity[s] = means[s - num_regulators] + noise[1] * _normal(state)
    if len(activity) > 2 * num_regulators:
        activity[2 * num_regulators] += shift
    if knocked >= 0:
        activity[knocked] = -1.0
        activity[num_regulators + knocked] = -math.inf


@_kernel
def _lowest_bit(word: Any) -> int:
    """Position of the lowest set bit of a word that is not 0, by a de Bruijn sequence."""
    low = word & (~word + np.uint64(1))
    return int(_BIT[(low * _DE_BRUIJN) >> np.uint64(58)])


@_kernel
def _collect(seen: Array, counts: Array, genes: Array, values: Array, used: int) -> int:
    """Append a cell's genes in ascending order, and clear ``seen`` and ``counts``."""
    for w in range(len(seen)):
        word = seen[w]
        while word:
            gene = w * 64 + _lowest_bit(word)
            genes[used] = gene
            values[used] = counts[gene]
            counts[gene] = 0
            used += 1
            word &= word - np.uint64(1)
        seen[w] = 0
    return used


@_kernel
def draw_cells(
    keys: Array,
    groups: Array,
    library: Array,
    knocked: Array,
    shifts: Array,
    rates: Array,
    threshold: Array,
    other: Array,
    mass: Array,
    means: Array,
    noise: Array,
    dynamic: Array,
    pointers: Array,
    sources: Array,
    weights: Array,
    dispersion: float,
    num_regulators: int,
    expected: int,
) -> tuple[Array, Array, Array]:
    """Draw the counts of N cells.

    Args:
        keys: (N,) uint64, where each cell's own random sequence starts.
        groups: (N,) row of ``rates``.
        library: (N,) library size, the sum of the means of a cell that no activity changes.
        knocked: (N,) the regulator that is knocked out, or -1.
        shifts: (N,) added to the level of the first pathway.
        rates: (G, V) float32 shares of the library size, dynamic genes included.
        threshold: (G, V) uint32 alias tables over the genes that are not dynamic.
        other: (G, V) int32, likewise.
        mass: (G,) sum of the rates of the genes that are not dynamic.
        means: (G, K + P) mean activities of K regulators and P pathways.
        noise: (2,) spread of a regulator's activity as a share of its mean, and of a pathway's
            level, over cells.
        dynamic: (D,) int64 dynamic genes.
        pointers: (D+1,) offsets of each dynamic gene's loadings.
        sources: (E,) the state that is loaded; see ``_activities``.
        weights: (E,) by how much.
        dispersion: phi.
        num_regulators: K.
        expected: non-zero counts to make room for at first.

    Returns:
        indptr (N+1,) int64, genes (Z,) int32 ascending within a cell, counts (Z,) float32.
    """
    num_genes = rates.shape[1]
    activity = np.zeros(means.shape[1] + num_regulators)
    counts = np.zeros(num_genes, np.int64)
    seen = np.zeros(num_genes // 64 + 1, np.uint64)
    indptr = np.zeros(len(keys) + 1, np.int64)
    genes = np.empty(max(expected, num_genes), np.int32)
    values = np.empty(max(expected, num_genes), np.float32)
    state = np.zeros(1, np.uint64)
    used = 0
    for i in range(len(keys)):
        state[0] = keys[i]
        g = groups[i]
        _activities(means[g], shifts[i], knocked[i], num_regulators, noise, state, activity)
        _draw_static(
            library[i], mass[g], rates[g], threshold[g], other[g], dispersion, state, counts, seen
        )
        _draw_dynamic(
            library[i], rates[g], dynamic, pointers, sources, weights, activity, dispersion,
            state, counts, seen,
        )  # fmt: skip
        if used + num_genes > len(genes):
            done = max(i, 1)
            room = int(used / done * len(keys) * 1.1) + 2 * num_genes
            more_genes = np.empty(room, np.int32)
            more_values = np.empty(room, np.float32)
            more_genes[:used] = genes[:used]
            more_values[:used] = values[:used]
            genes = more_genes
            values = more_values
        used = _collect(seen, counts, genes, values, used)
        indptr[i + 1] = used
    return indptr, genes[:used], values[:used]


@_kernel
def hash_cells(indptr: Array, genes: Array, bits: Array, gene_hashes: Array) -> Array:
    """What :func:`cellray.data.digest.cell_hashes` gives, without its temporary arrays.

    Args:
        indptr: (N+1,) offsets.
        genes: (Z,) rows of ``gene_hashes``.
        bits: (Z,) uint32, the float32 counts as bits.
        gene_hashes: (V,) uint64.

    Returns:
        (N,) uint64.
    """
    result = np.zeros(len(indptr) - 1, np.uint64)
    for i in range(len(result)):
        total = np.uint64(0)
        for j in range(indptr[i], indptr[i + 1]):
            total += _splitmix(gene_hashes[genes[j]] ^ _splitmix(np.uint64(bits[j])))
        result[i] = total
    return result
