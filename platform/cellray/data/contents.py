"""Hashes of what cells hold, so that the same cell is known again in another store.

Two hashes a cell: of all its (gene id, count) pairs, and a coarse one of its largest genes and its
total. Both depend on gene ids without version and on counts alone: neither the order of the genes,
nor genes without counts, nor the cell's name matter. A store that leaves out genes which the cell
has counts of (a choice of variable genes) changes the first hash.

Legend: N cells, V genes of the store, Z non-zero counts of a block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numba
import numpy as np
import numpy.typing as npt

from cellray.core.blocks import CellBlock
from cellray.core.draw import splitmix64
from cellray.core.ids import joinids_of, stores_of
from cellray.data import schema
from cellray.data.digest import cell_hashes, hash64
from cellray.data.stores import AnyStore, JoinedStore
from cellray.data.vocab import strip_version

__all__ = ["TOP_GENES", "content_hashes", "keeps_hashes", "near_hashes"]

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
Say = Callable[[str], None]

TOP_GENES = 64
_BLOCK_CELLS = 4096
_SAY_EVERY_S = 10.0


def keeps_hashes(store: AnyStore) -> bool:
    """Whether obs holds the hashes, so that :func:`content_hashes` reads no counts."""
    if isinstance(store, JoinedStore):
        return all(keeps_hashes(one) for one in store.stores)
    return store.measurement == schema.MEASUREMENT and store.has_obs(schema.CELL_HASH)


def content_hashes(store: AnyStore, joinids: I64, *, say: Say | None = None) -> U64:
    """A hash of each cell's counts, see :func:`cellray.data.digest.cell_hashes`.

    Of a store that cellray wrote: what ingest has kept in obs. Of others, and of measurements
    other than RNA: computed, which reads the counts of all the cells.

    Args:
        store: where the cells are.
        joinids: (N,) distinct cells, in any order.
        say: receives progress where counts are read.

    Returns:
        (N,) uint64 in the order of ``joinids``; 0 for a cell without counts.
    """
    if isinstance(store, JoinedStore):
        which, hashes = stores_of(joinids), np.zeros(len(joinids), dtype=np.uint64)
        for number, one in enumerate(store.stores):
            here = np.flatnonzero(which == number)
            hashes[here] = content_hashes(one, joinids_of(joinids[here]), say=say)
        return hashes
    if keeps_hashes(store):
        obs = store.obs([schema.CELL_HASH])
        rows = np.searchsorted(obs[schema.JOINID].to_numpy(), joinids)
        return np.asarray(obs[schema.CELL_HASH].to_numpy().astype(np.uint64)[rows])
    genes = _gene_hashes(store)
    return _by_block(store, joinids, lambda b: cell_hashes(b.indptr, b.genes, b.counts, genes), say)


def near_hashes(
    store: AnyStore, joinids: I64, *, top: int = TOP_GENES, say: Say | None = None
) -> U64:
    """A hash of each cell's ``top`` genes with the largest counts, as a set, and of its total.

    Of genes with equal counts those whose id hashes lowest come first. Reads the counts.

    Args:
        store: where the cells are.
        joinids: (N,) distinct cells, in any order.
        top: genes looked at.
        say: receives progress.

    Returns:
        (N,) uint64 in the order of ``joinids``; 0 for a cell without counts.
    """
    genes = _gene_hashes(store)

    def of_block(block: CellBlock) -> U64:
        found = _top_sums(block.indptr, block.genes, block.counts, genes, top)
        totals = block.library_sizes.astype(np.float32).view(np.uint32).astype(np.uint64)
        return np.where(found == 0, found, splitmix64(found ^ splitmix64(totals)))

    return _by_block(store, joinids, of_block, say)


def _gene_hashes(store: AnyStore) -> U64:
    return hash64([strip_version(gene) for gene in store.var()["feature_id"]])


def _by_block(
    store: AnyStore, joinids: I64, use: Callable[[CellBlock], U64], say: Say | None
) -> U64:
    """What ``use`` gives of each cell, read in the order of the store."""
    order = np.argsort(joinids, kind="stable")
    result = np.zeros(len(joinids), dtype=np.uint64)
    done = 0
    for block in _blocks(store, joinids[order], say):
        result[order[done : done + len(block)]] = use(block)
        done += len(block)
    return result


def _blocks(store: AnyStore, ascending: I64, say: Say | None) -> Iterator[CellBlock]:
    every = np.arange(store.num_genes, dtype=np.int32)
    started = told = time.monotonic()
    for first in range(0, len(ascending), _BLOCK_CELLS):
        yield store.read_block(ascending[first : first + _BLOCK_CELLS], every)
        now, done = time.monotonic(), min(first + _BLOCK_CELLS, len(ascending))
        if say and now - told > _SAY_EVERY_S:
            told = now
            left = (now - started) / done * (len(ascending) - done)
            say(f"hashing cells: {done:,}/{len(ascending):,}  ETA {left:.0f} s")


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _sink(counts: npt.NDArray[np.float32], keys: U64) -> None:
    """Move the root of a heap to its place: at the root is the smallest count, largest key."""
    at = 0
    while True:
        worst = at
        for child in (2 * at + 1, 2 * at + 2):
            if child < len(counts) and (
                counts[child] < counts[worst]
                or (counts[child] == counts[worst] and keys[child] > keys[worst])
            ):
                worst = child
        if worst == at:
            return
        counts[at], counts[worst] = counts[worst], counts[at]
        keys[at], keys[worst] = keys[worst], keys[at]
        at = worst


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _top_sums(
    indptr: I64,
    genes: npt.NDArray[np.int32],
    counts: npt.NDArray[np.float32],
    gene_hashes: U64,
    top: int,
) -> U64:
    """(N,) sum mod 2^64 of the mixed hashes of each cell's largest genes."""
    golden, first = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
    second = np.uint64(0x94D049BB133111EB)
    out = np.zeros(len(indptr) - 1, dtype=np.uint64)
    largest, keys = np.zeros(top, dtype=np.float32), np.zeros(top, dtype=np.uint64)
    for i in range(len(out)):
        largest[:] = 0
        keys[:] = 0
        for j in range(indptr[i], indptr[i + 1]):
            key = gene_hashes[genes[j]]
            if counts[j] > largest[0] or (counts[j] == largest[0] and key < keys[0]):
                largest[0], keys[0] = counts[j], key
                _sink(largest, keys)
        total = np.uint64(0)
        for k in range(top):
            if largest[k] > 0:
                z = keys[k] + golden
                z = (z ^ (z >> np.uint64(30))) * first
                z = (z ^ (z >> np.uint64(27))) * second
                total += z ^ (z >> np.uint64(31))
        out[i] = total
    return out
