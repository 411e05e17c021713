"""Compiled loops of the tokenizers over whole blocks of cells; each is a pure function.

Kernels compile on first use and are cached beside this file, so that a new actor starts in
milliseconds. None of them may use fast-math: the tests compare them bit for bit with NumPy. They
use no NumPy sort or search, which would take numba seconds to compile.

Legend: N cells, Z non-zero counts, T tokens written, Q quantile edges, G vocabulary genes, n the
genes of one cell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

__all__ = ["bin_cells", "rank_cells"]

F = TypeVar("F", bound=Callable[..., Any])
Array = np.ndarray[Any, Any]

# Three passes of 11 bits cover any 32-bit key; short lists are sorted by insertion.
_DIGIT_BITS = 11
_DIGITS = 1 << _DIGIT_BITS
_PASSES = 3
_SHORT = 48
# Whole counts below this are counted into a histogram; the few others of a cell are sorted.
_SMALL = 512
_BUCKETS = 1024


def _kernel(function: F) -> F:
    compiled: F = numba.njit(cache=True, nogil=True)(function)
    return compiled


@_kernel
def _insertion_sort(keys: Array, order: Array, n: int) -> None:
    """Sort ``n`` keys in place, stably; ``order`` receives where each came from."""
    for i in range(n):
        key = keys[i]
        j = i
        while j > 0 and keys[j - 1] > key:
            keys[j] = keys[j - 1]
            order[j] = order[j - 1]
            j -= 1
        keys[j] = key
        order[j] = i


@_kernel
def _digit_offsets(keys: Array, n: int, offsets: Array) -> None:
    """Where each digit's first key goes, for the three passes at once: (_PASSES, _DIGITS)."""
    mask = np.uint32(_DIGITS - 1)
    for p in range(_PASSES):
        for digit in range(_DIGITS):
            offsets[p, digit] = 0
    for i in range(n):
        key = keys[i]
        offsets[0, key & mask] += 1
        offsets[1, (key >> np.uint32(_DIGIT_BITS)) & mask] += 1
        offsets[2, key >> np.uint32(2 * _DIGIT_BITS)] += 1
    for p in range(_PASSES):
        total = 0
        for digit in range(_DIGITS):
            count = offsets[p, digit]
            offsets[p, digit] = total
            total += count


@_kernel
def _argsort(
    keys: Array, order: Array, spare_keys: Array, spare_order: Array, n: int, offsets: Array
) -> Array:
    """Stable ascending order of ``n`` keys: the first ``n`` entries of the returned buffer.

    Args:
        keys: (>= n,) uint32, overwritten.
        order: (>= n,) int32, overwritten.
        spare_keys: (>= n,) uint32 scratch.
        spare_order: (>= n,) int32 scratch.
        n: how many.
        offsets: (_PASSES, _DIGITS) int64 scratch.
    """
    if n <= _SHORT:
        _insertion_sort(keys, order, n)
        return order
    for i in range(n):
        order[i] = i
    _digit_offsets(keys, n, offsets)
    for p in range(_PASSES):
        shift = np.uint32(_DIGIT_BITS * p)
        place = offsets[p]
        for i in range(n):
            key = keys[i]
            digit = (key >> shift) & np.uint32(_DIGITS - 1)
            to = place[digit]
            place[digit] = to + 1
            spare_keys[to] = key
            spare_order[to] = order[i]
        keys, spare_keys = spare_keys, keys
        order, spare_order = spare_order, order
    return order


@_kernel
def _longest(indptr: Array) -> int:
    longest = 1
    for cell in range(len(indptr) - 1):
        longest = max(longest, indptr[cell + 1] - indptr[cell])
    return longest


@_kernel
def rank_cells(
    indptr: Array,
    genes: Array,
    counts: Array,
    medians: Array,
    scales: Array,
    gene_tokens: Array,
    out_indptr: Array,
    first: int,
    kept: Array,
    tokens: Array,
    values: Array,
) -> None:
    """Write each cell's genes by descending ``float32(count / median)``, ties in gene order.

    Args:
        indptr: (N+1,) int64 offsets of the cells.
        genes: (Z,) int32 vocabulary ids, ascending within a cell.
        counts: (Z,) float32, > 0.
        medians: (G,) float32, > 0.
        scales: (N,) float32, what a cell's scores are multiplied by when emitted.
        gene_tokens: (G,) int32.
        out_indptr: (N+1,) int64 offsets of the output.
        first: where a cell's genes begin after its output offset (specials before them).
        kept: (N,) int64 genes to write per cell.
        tokens: (T,) int32, written.
        values: (T,) float32, written.
    """
    longest = _longest(indptr)
    scores = np.empty(longest, np.float32)
    bits = scores.view(np.uint32)
    keys = np.empty(longest, np.uint32)
    order = np.empty(longest, np.int32)
    spare_keys = np.empty(longest, np.uint32)
    spare_order = np.empty(longest, np.int32)
    offsets = np.empty((_PASSES, _DIGITS), np.int64)
    for cell in range(len(kept)):
        start = indptr[cell]
        n = indptr[cell + 1] - start
        for i in range(n):
            scores[i] = counts[start + i] / medians[genes[start + i]]
        for i in range(n):
            keys[i] = ~bits[i]  # positive floats sort as their bits do; inverted, descending
        ranked = _argsort(keys, order, spare_keys, spare_order, n, offsets)
        to = out_indptr[cell] + first
        for i in range(kept[cell]):
            source = ranked[i]
            tokens[to + i] = gene_tokens[genes[start + source]]
            values[to + i] = scores[source] * scales[cell]


@_kernel
def _mix(x: np.uint64) -> np.uint64:
    """:func:`cellray.core.draw.splitmix64` on one number."""
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_kernel
def _count(counts: Array, small: Array, histogram: Array, others: Array) -> int:
    """Count the small whole numbers of a cell and set apart what else it has.

    Args:
        counts: (n,) float32, > 0.
        small: (>= n,) int32, written: the value if it is a whole number below _SMALL, else 0.
        histogram: (_SMALL,) int64 zeros, written.
        others: (>= n,) float32, written: the other values.

    Returns:
        How many others there are.
    """
    num_others = 0
    for i in range(len(counts)):  # without branches, which counts would mispredict
        value = counts[i]
        whole = np.int32(min(value, np.float32(_SMALL - 0.5)))
        is_whole = np.float32(whole) == value
        small[i] = whole if is_whole else 0
        histogram[small[i]] += 1
        others[num_others] = value
        num_others += not is_whole
    histogram[0] = 0
    return num_others


@_kernel
def _edges(
    n: int,
    histogram: Array,
    num_others: int,
    others: Array,
    order: Array,
    levels: Array,
    edges: Array,
) -> None:
    """Quantiles of a cell, linearly interpolated as numpy.quantile does in float64.

    Small whole numbers and the others are walked together in ascending order, so that the order
    statistics are found without sorting the cell.

    Args:
        n: genes of the cell, > 0.
        histogram: (_SMALL,) of the small whole numbers.
        num_others: how many values are not small whole numbers.
        others: (num_others,) float32 these values.
        order: (num_others,) their ascending order.
        levels: (Q,) float64, ascending from 0 to 1.
        edges: (Q,) float64, written.
    """
    whole, other = 0, 0
    upto, upto_next = 0, 0  # values <= low, values <= high
    low = high = 0.0  # a distinct value of the cell and the next one
    for q in range(len(levels)):
        position = levels[q] * np.float64(n - 1)
        index = np.int64(np.floor(position))
        while upto <= index:
            low, upto = high, upto_next
            while whole < _SMALL and histogram[whole] == 0:
                whole += 1
            value = np.float64(others[order[other]]) if other < num_others else np.inf
            if whole < _SMALL and whole < value:
                high = np.float64(whole)
                upto_next += histogram[whole]
                whole += 1
            elif other < num_others:
                high = value
                upto_next += 1
                other += 1
        above = high if index + 1 == upto and upto < n else low
        t = position - np.float64(index)
        step = above - low
        edges[q] = low + step * t if t < 0.5 else above - step * (1.0 - t)


@_kernel
def _whole_bins(histogram: Array, edges: Array, lefts: Array, spans: Array) -> None:
    """(edges <= v) and (edges < v) - (edges <= v) of every small whole number; clears them."""
    below = upto = 0
    for whole in range(_SMALL):
        if histogram[whole] > 0:
            while below < len(edges) and edges[below] < whole:
                below += 1
            while upto < len(edges) and edges[upto] <= whole:
                upto += 1
            lefts[whole], spans[whole] = upto, below - upto
            histogram[whole] = 0


@_kernel
def _other_bin(edges: Array, value: np.float64) -> tuple[float, float]:
    """What :func:`_whole_bins` gives, for any other value."""
    below = 0
    for edge in edges:
        below += edge < value
    upto = below
    while upto < len(edges) and edges[upto] <= value:
        upto += 1
    return np.float64(upto), np.float64(below - upto)


@_kernel
def _sample(hashes: Array, n: int, kept: int, chosen: Array, buckets: Array, near: Array) -> None:
    """Positions of the ``kept`` smallest of ``n`` distinct uniform hashes, ascending.

    Args:
        hashes: (>= n,) uint64.
        n: how many.
        kept: how many to choose, 0 < kept < n.
        chosen: (>= n + 1,) int64, written.
        buckets: (_BUCKETS,) int64 scratch.
        near: (>= n,) uint64 scratch.
    """
    shift = np.uint64(54)  # 64 bits - 10 bits of _BUCKETS
    buckets[:] = 0
    for i in range(n):
        buckets[hashes[i] >> shift] += 1
    bucket, smaller = 0, 0
    while smaller + buckets[bucket] < kept:
        smaller += buckets[bucket]
        bucket += 1
    # The few hashes of the bucket that the limit falls into, by insertion sort.
    num_near = 0
    for i in range(n):
        if hashes[i] >> shift == np.uint64(bucket):
            j = num_near
            while j > 0 and near[j - 1] > hashes[i]:
                near[j] = near[j - 1]
                j -= 1
            near[j] = hashes[i]
            num_near += 1
    limit = near[kept - smaller - 1]
    to = 0
    for i in range(n):
        chosen[to] = i
        to += hashes[i] <= limit


@_kernel
def _hash_genes(genes: Array, token_hashes: Array, key: Any, picked: Array, hashes: Array) -> None:
    """Hashes of a cell's genes under one key; two loops, so that the second is vectorised."""
    for i in range(len(genes)):
        picked[i] = token_hashes[genes[i]]
    for i in range(len(genes)):
        hashes[i] = _mix(key ^ picked[i])


@_kernel
def bin_cells(
    indptr: Array,
    genes: Array,
    counts: Array,
    levels: Array,
    gene_tokens: Array,
    token_hashes: Array,
    bin_keys: Array,
    sample_keys: Array,
    out_indptr: Array,
    first: int,
    kept: Array,
    tokens: Array,
    values: Array,
) -> None:
    """Bin each cell on its own quantiles, and write a keyed sample of its genes in gene order.

    Args:
        indptr: (N+1,) int64 offsets of the cells.
        genes: (Z,) int32 vocabulary ids.
        counts: (Z,) float32, > 0.
        levels: (Q,) float64 quantile levels, ascending from 0 to 1.
        gene_tokens: (G,) int32.
        token_hashes: (G,) uint64, splitmix64 of each gene's token id.
        bin_keys: (N,) uint64 cell keys of the tie draws.
        sample_keys: (N,) uint64 cell keys of the gene sample.
        out_indptr: (N+1,) int64 offsets of the output.
        first: where a cell's genes begin after its output offset.
        kept: (N,) int64 genes to write per cell.
        tokens: (T,) int32, written.
        values: (T,) float32 bins 1..Q, written.
    """
    longest = _longest(indptr)
    small = np.empty(longest, np.int32)
    others = np.empty(longest, np.float32)
    bits = others.view(np.uint32)
    keys = np.empty(longest, np.uint32)
    order = np.empty(longest, np.int32)
    spare_keys = np.empty(longest, np.uint32)
    spare_order = np.empty(longest, np.int32)
    offsets = np.empty((_PASSES, _DIGITS), np.int64)
    hashes = np.empty(longest, np.uint64)
    near = np.empty(longest, np.uint64)
    picked = np.empty(longest, np.uint64)
    chosen = np.empty(longest + 1, np.int64)
    histogram = np.zeros(_SMALL, np.int64)
    buckets = np.empty(_BUCKETS, np.int64)
    edges = np.empty(len(levels), np.float64)
    lefts = np.empty(_SMALL, np.float64)
    spans = np.empty(_SMALL, np.float64)
    for cell in range(len(kept)):
        start, stop = indptr[cell], indptr[cell + 1]
        n = stop - start
        if n == 0:
            continue
        of_cell = counts[start:stop]
        num_others = _count(of_cell, small, histogram, others)
        keys[:num_others] = bits[:num_others]
        ranked = _argsort(keys, order, spare_keys, spare_order, num_others, offsets)
        _edges(n, histogram, num_others, others, ranked, levels, edges)
        _whole_bins(histogram, edges, lefts, spans)
        if kept[cell] < n:
            _hash_genes(genes[start:stop], token_hashes, sample_keys[cell], picked, hashes)
            _sample(hashes, n, kept[cell], chosen, buckets, near)
        else:
            chosen[:n] = np.arange(n)
        # Hashes in a loop of their own: it compiles to vector instructions.
        for k in range(kept[cell]):
            picked[k] = token_hashes[genes[start + chosen[k]]]
        for k in range(kept[cell]):
            hashes[k] = _mix(bin_keys[cell] ^ picked[k]) >> np.uint64(11)
        to = out_indptr[cell] + first
        for k in range(kept[cell]):
            i = chosen[k]
            if small[i]:
                left, span = lefts[small[i]], spans[small[i]]
            else:
                left, span = _other_bin(edges, np.float64(of_cell[i]))
            tokens[to + k] = gene_tokens[genes[start + i]]
            values[to + k] = np.ceil(np.float64(np.int64(hashes[k])) * 2.0**-53 * span + left)
