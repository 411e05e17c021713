"""One part of a relayout: some cells of a store, read and written to an array of their own.

It leaves what a part of an ingest leaves (:mod:`cellray.data.parts`), so that a relayout can be
divided among processes and goes on where it was interrupted.

Legend: N cells of the part, V genes of the measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from cellray.core.blocks import CellBlock
from cellray.core.memory import keep_freed_memory
from cellray.data.digest import cell_hashes
from cellray.data.h5ad import check_counts
from cellray.data.parts import digest_of, leave
from cellray.data.sketch import SketchBuilder, StoredSketch, sketch_counts
from cellray.data.soma import Store
from cellray.data.writer import write_block

__all__ = ["StorePart", "cut", "spans"]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Tick = Callable[[int], None]

_BLOCKS = 4


def spans(joinids: I64, size: int) -> Iterator[slice]:
    """The parts of ascending joinids that lie between multiples of ``size``."""
    edges = np.flatnonzero(np.diff(joinids // size)) + 1
    bounds = [0, *edges.tolist(), len(joinids)]
    for first, last in pairwise(bounds):
        yield slice(first, last)


def cut(
    store: Store, joinids: I64, *, cells_per_block: int, gene_hashes: U64, stamp: str
) -> list[StorePart]:
    """All parts of a relayout, a few blocks each.

    Args:
        store: what is read.
        joinids: (N,) ascending; they become 0 .. N-1.
        cells_per_block: source rows in memory at a time.
        gene_hashes: (V,) hash of each gene.
        stamp: what the content of the store is known by.
    """
    return [
        StorePart(store, joinids[span], span.start, cells_per_block, gene_hashes, stamp)
        for span in spans(joinids, _BLOCKS * cells_per_block)
    ]


@dataclass(frozen=True, eq=False)
class StorePart:
    """Some cells of a store.

    Attributes:
        store: what is read.
        joinids: (N,) ascending, in the source.
        first: the joinid of the first in the target.
        cells_per_block: source rows in memory at a time.
        gene_hashes: (V,) hash of each gene.
        stamp: what the content of the store is known by.
    """

    store: Store
    joinids: I64
    first: int
    cells_per_block: int
    gene_hashes: U64
    stamp: str

    @property
    def num_cells(self) -> int:
        """N."""
        return len(self.joinids)

    @property
    def key(self) -> str:
        """Name of its folder: decided by all that its content depends on."""
        origin = (self.store.uri, self.store.measurement, self.store.layer, self.stamp)
        order = (self.joinids, self.first, self.cells_per_block)
        return digest_of("relayout", *origin, *order, self.gene_hashes)

    def run(self, folder: Path, tick: Tick) -> None:
        """Read and write it, under ``folder``; nothing to do if that was done before.

        Args:
            folder: of all parts.
            tick: is told the cells of each block that is done.

        Raises:
            DataError: the store cannot be read, a value is no raw count, or the disk is full.
        """
        keep_freed_memory()
        leave(folder, self.key, lambda x, making: self._copy(x, making, tick))

    def _blocks(self) -> Iterator[tuple[slice, CellBlock]]:
        """Blocks in order; the next one is read while this one is worked on."""
        genes = np.arange(self.store.num_genes, dtype=np.int32)
        whole = list(spans(self.joinids, self.cells_per_block))
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self.store.read_block, self.joinids[whole[0]], genes)
            for i, span in enumerate(whole):
                block = ahead.result()
                if i + 1 < len(whole):
                    following = self.joinids[whole[i + 1]]
                    ahead = reader.submit(self.store.read_block, following, genes)
                yield span, block

    def _copy(self, x: Any, making: Path, tick: Tick) -> Mapping[str, npt.NDArray[Any]]:
        num_genes = self.store.num_genes
        sketch, gene_cells = SketchBuilder(), np.zeros(num_genes, dtype=np.int64)
        sums, hashes, nonzero = [], [], []
        for span, block in self._blocks():
            indptr, genes, counts = block.indptr, block.genes, block.counts
            check_counts(
                counts,
                where=f"'{self.store.uri}' layer {self.store.layer}, cells "
                f"{self.first + span.start}-{self.first + span.stop - 1},",
                advice=" Name the layer that has them (--layer)",
            )
            matrix = sparse.csr_matrix((counts, genes, indptr), shape=(len(block), num_genes))
            write_block(x, matrix, self.first + span.start, num_genes)
            total = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
            nonzero.append(np.diff(indptr).astype(np.int64))
            sums.append(np.diff(total[indptr]))
            sketch.add(sketch_counts(indptr, genes, counts, sums[-1]))
            hashes.append(cell_hashes(indptr, genes, counts, self.gene_hashes))
            gene_cells += np.bincount(genes, minlength=num_genes)
            tick(len(block))
        StoredSketch.write(making, sketch.result())
        return {
            "hashes": np.concatenate(hashes),
            "sums": np.concatenate(sums),
            "nonzero": np.concatenate(nonzero),
            "gene_cells": gene_cells,
        }
