"""Per-gene figures of normalised counts as a streamed histogram that merges exactly.

Every non-zero count becomes count / library size x 10,000 and falls into a bucket named by the
upper bits of its float32: the exponent and 7 bits of the mantissa. A bucket is at most 1/128 of
its value wide, so its middle is wrong by less than 0.4 % (1/256) for all that fell into it. A
sketch is the sorted list of the buckets that were hit, with how often. Merging adds counts: the
result does not depend on how the cells were divided or in what order the parts were merged, down
to the bytes. (A t-digest does not have this property, and has no bound for one gene's median.)

Legend: N cells, Z non-zero counts, V genes of the measurement, K buckets that were hit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellray.core.blocks import row_ids
from cellray.core.errors import DataError

__all__ = [
    "MAX_GENES",
    "MAX_RELATIVE_ERROR",
    "NUM_BUCKETS",
    "TARGET_SUM",
    "UNSEEN",
    "Sketch",
    "SketchBuilder",
    "StoredSketch",
    "merge",
    "merged_shards",
    "noting_medians",
    "quantile",
    "sketch_counts",
]

TARGET_SUM = 10_000.0  # Geneformer's size factor (doi:10.1038/s41586-023-06139-9)
UNSEEN = 1.0  # the median of a gene that no cell expresses

_MANTISSA_BITS = 7
_BUCKET_BITS = 12
_LOWEST_EXPONENT = -18  # 10,000 / 2.6e9: no cell has more counts than that
_SHIFT = np.uint32(23 - _MANTISSA_BITS)
_SHARD_BITS = 9  # genes that are merged at a time: 512
_KEYS, _COUNTS, _BOUNDS = "sketch_keys.u4", "sketch_counts.u4", "sketch_bounds.i8"
_BASE = (127 + _LOWEST_EXPONENT) << _MANTISSA_BITS

NUM_BUCKETS = 1 << _BUCKET_BITS
MAX_GENES = 1 << (32 - _BUCKET_BITS)
MAX_RELATIVE_ERROR = 2.0 ** -(_MANTISSA_BITS + 1)

U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Sketch:
    """How often each (gene, bucket) was hit.

    Attributes:
        keys: (K,) uint32, ascending: gene * 4,096 + bucket.
        counts: (K,) uint32, each at least 1.
    """

    keys: U32 = field(default_factory=lambda: np.zeros(0, np.uint32))
    counts: U32 = field(default_factory=lambda: np.zeros(0, np.uint32))

    def to_bytes(self) -> bytes:
        """The sketch as bytes; equal sketches give equal bytes."""
        return self.keys.astype("<u4").tobytes() + self.counts.astype("<u4").tobytes()

    @property
    def genes(self) -> I64:
        """(K,) the gene of each key."""
        return (self.keys >> np.uint32(_BUCKET_BITS)).astype(np.int64)

    @property
    def buckets(self) -> I64:
        """(K,) the bucket of each key."""
        return (self.keys & np.uint32(NUM_BUCKETS - 1)).astype(np.int64)

    @property
    def num_shards(self) -> int:
        """How many stretches of 512 genes reach up to its last gene."""
        return max(0, len(_bounds(self)) - 1)

    def shard(self, number: int) -> Sketch:
        """The genes 512 * number and the 511 after."""
        bounds = _bounds(self)[number : number + 2]
        part = slice(*bounds) if len(bounds) == 2 else slice(0)
        return Sketch(self.keys[part], self.counts[part])

    @staticmethod
    def of(genes: I64, buckets: I64, counts: I64) -> Sketch:
        """Put together what :attr:`genes`, :attr:`buckets` and ``counts`` gave, in any order."""
        keys = (genes.astype(np.uint32) << np.uint32(_BUCKET_BITS)) | buckets.astype(np.uint32)
        order = np.argsort(keys, kind="stable")
        return Sketch(keys[order], counts[order].astype(np.uint32))


class StoredSketch:
    """A sketch in a folder, read one stretch of 512 genes (a shard) at a time.

    Args:
        folder: where :meth:`write` put it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bounds = np.fromfile(folder / _BOUNDS, dtype=np.int64)

    @staticmethod
    def write(folder: Path, sketch: Sketch) -> None:
        """Write a sketch into a folder that is there."""
        np.array(_bounds(sketch), dtype=np.int64).tofile(folder / _BOUNDS)
        sketch.keys.tofile(folder / _KEYS)
        sketch.counts.tofile(folder / _COUNTS)

    @property
    def num_shards(self) -> int:
        """How many shards it has; later ones are empty."""
        return max(0, len(self._bounds) - 1)

    def shard(self, number: int) -> Sketch:
        """One shard."""
        if number >= self.num_shards:
            return Sketch()
        first, last = map(int, self._bounds[number : number + 2])
        keys, counts = (
            np.fromfile(self._folder / name, np.uint32, last - first, offset=4 * first)
            for name in (_KEYS, _COUNTS)
        )
        return Sketch(keys, counts)


def merged_shards(sketches: Sequence[StoredSketch | Sketch]) -> Iterator[Sketch]:
    """Merge sketches shard by shard: memory holds one shard of them, and little more.

    Yields:
        The shards of the sum, genes ascending.
    """
    for number in range(max((s.num_shards for s in sketches), default=0)):
        stack: list[Sketch] = []
        for sketch in sketches:
            stack.append(sketch.shard(number))
            while len(stack) > 1 and len(stack[-2].keys) < 2 * len(stack[-1].keys):
                last = stack.pop()
                stack[-1] = _merge_shards(stack[-1], last)
        while len(stack) > 1:
            last = stack.pop()
            stack[-1] = _merge_shards(stack[-1], last)
        yield stack[0]


def _fold(keys: U32, counts: U32) -> Sketch:
    """Sum the counts of equal keys; the keys are sorted."""
    if len(keys) == 0:
        return Sketch()
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return Sketch(keys[first], np.add.reduceat(counts, first, dtype=np.uint32))


def _bounds(sketch: Sketch) -> list[int]:
    """Where each shard of 512 genes begins, and the last one ends; [] for an empty sketch."""
    if len(sketch.keys) == 0:
        return []
    shift = _BUCKET_BITS + _SHARD_BITS
    starts = np.arange(1, (int(sketch.keys[-1]) >> shift) + 1, dtype=np.uint64) << np.uint64(shift)
    return [0, *np.searchsorted(sketch.keys, starts.astype(np.uint32)).tolist(), len(sketch.keys)]


def _cut(sketch: Sketch) -> list[Sketch]:
    """The sketch in shards of 512 genes each, copied, so that each can be let go by itself."""
    return [
        Sketch(sketch.keys[i:j].copy(), sketch.counts[i:j].copy())
        for i, j in pairwise(_bounds(sketch))
    ]


def _merge_shards(a: Sketch, b: Sketch) -> Sketch:
    most = float(a.counts.max(initial=0)) + float(b.counts.max(initial=0))
    if most > np.iinfo(np.uint32).max:
        raise DataError("more than 4,294,967,295 cells express a gene: too many for one store")
    keys = np.concatenate([a.keys, b.keys])
    order = np.argsort(keys, kind="stable")  # two sorted runs: merged in one pass
    return _fold(keys[order], np.concatenate([a.counts, b.counts])[order])


def sketch_counts(
    indptr: npt.NDArray[np.integer],
    genes: npt.NDArray[np.integer],
    counts: npt.NDArray[np.float32],
    library_sizes: npt.NDArray[np.floating],
) -> Sketch:
    """The sketch of some cells.

    Args:
        indptr: (N+1,) offsets of the cells.
        genes: (Z,) row of var of each count.
        counts: (Z,) counts, none zero.
        library_sizes: (N,) total counts of each cell over all genes.

    Raises:
        DataError: a gene beyond :data:`MAX_GENES`.
    """
    if len(genes) == 0:
        return Sketch()
    if int(genes.max()) >= MAX_GENES:
        raise DataError(
            f"a measurement of more than {MAX_GENES:,} features is not supported; leave some out"
        )
    size = np.asarray(library_sizes, dtype=np.float64)[row_ids(indptr)]
    values = (counts / size * TARGET_SUM).astype(np.float32)
    bucket = (values.view(np.uint32) >> _SHIFT).astype(np.int64) - _BASE
    low = np.clip(bucket, 0, NUM_BUCKETS - 1).astype(np.uint32)
    keys = (genes.astype(np.uint32) << np.uint32(_BUCKET_BITS)) | low
    keys.sort()
    return _fold(keys, np.ones(len(keys), np.uint32))


def merge(sketches: Iterable[Sketch]) -> Sketch:
    """The sketch of all cells of all sketches: exact, whatever their order or number."""
    builder = SketchBuilder()
    for sketch in sketches:
        builder.add(sketch)
    return builder.result()


class SketchBuilder:
    """Merges sketches as they come; holds at most about twice the result."""

    def __init__(self) -> None:
        self._stack: list[list[Sketch]] = []

    def add(self, sketch: Sketch) -> None:
        """Take in one more sketch."""
        self._stack.append(_cut(sketch))
        while len(self._stack) > 1 and self._size(-2) < 2 * self._size(-1):
            self._merge_last()

    def _size(self, place: int) -> int:
        return sum(len(shard.keys) for shard in self._stack[place])

    def _merge_last(self) -> None:
        small, large = self._stack.pop(), self._stack.pop()
        if len(small) > len(large):
            small, large = large, small
        for i in range(len(small)):
            large[i] = _merge_shards(large[i], small[i])
            small[i] = Sketch()  # let go of it now: the two are never held beside their sum
        self._stack.append(large)

    def result(self) -> Sketch:
        """All that was added."""
        while len(self._stack) > 1:
            self._merge_last()
        shards = self._stack[0] if self._stack else []
        if not shards:
            return Sketch()
        return Sketch(
            np.concatenate([s.keys for s in shards]), np.concatenate([s.counts for s in shards])
        )


def _middle(buckets: I64) -> npt.NDArray[np.float64]:
    """The middle of each bucket."""
    half = np.uint32(1 << (int(_SHIFT) - 1))
    bits = ((buckets + _BASE).astype(np.uint32) << _SHIFT) | half
    return bits.view(np.float32).astype(np.float64)


def quantile(sketch: Sketch, num_genes: int, *, q: float = 0.5) -> F32:
    """A quantile of each gene's non-zero normalised counts.

    The median of an even number of values is the mean of the two in the middle, as numpy has it;
    any other quantile is the nearest value below.

    Args:
        sketch: of the cells.
        num_genes: V.
        q: 0..1; 0.5 is the median.

    Returns:
        (V,) float32, off by less than 0.4 % (:data:`MAX_RELATIVE_ERROR`) relative to the exact
        figure; 1.0 for a gene that no cell expresses.
    """
    starts = (np.arange(num_genes, dtype=np.uint64) << np.uint64(_BUCKET_BITS)).astype(np.uint32)
    bounds = np.append(np.searchsorted(sketch.keys, starts), len(sketch.keys))
    upto = np.concatenate([[0], np.cumsum(sketch.counts, dtype=np.int64)])
    start, total = upto[bounds[:-1]], np.diff(upto[bounds])
    seen = total > 0
    last = total[seen] - 1
    lower = last // 2 if q == 0.5 else np.floor(q * last).astype(np.int64)
    upper = (last + 1) // 2 if q == 0.5 else lower
    found = np.full(num_genes, UNSEEN, dtype=np.float32)
    parts = []
    for rank in (lower, upper):
        entry = np.searchsorted(upto, start[seen] + rank, side="right") - 1
        bucket = sketch.keys[entry] & np.uint32(NUM_BUCKETS - 1)
        parts.append(_middle(bucket.astype(np.int64)))
    found[seen] = (parts[0] + parts[1]) / 2
    return found


def noting_medians(shards: Iterable[Sketch], medians: F32) -> Iterator[Sketch]:
    """Pass the shards of a sketch on, and note the medians of their genes.

    Args:
        shards: as from :func:`merged_shards`.
        medians: (V,) filled with 1.0; the medians of genes that are expressed go into it.
    """
    for shard in shards:
        found = quantile(shard, len(medians))
        np.copyto(medians, found, where=found != UNSEEN)
        yield shard
