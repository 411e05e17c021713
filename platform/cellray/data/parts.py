"""One part of an ingest: some rows of one file, read, checked and written to an array of their own.

A part leaves a folder named after everything that decides its content:

    <key>/X             an array with the part's fragments of X, joinids and genes as in the store
    <key>/figures.npz   what was measured of its cells, and of the genes over its cells

The folder appears whole or not at all, so an ingest that was interrupted takes over the parts
that are there. The fragments of all parts together are X of the store: TileDB keeps each by
itself, with the schema that it was written under.

Legend: N cells of a part, V genes of the measurement, K buckets of a sketch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tiledbsoma
from scipy import sparse

from cellray.core.errors import DataError
from cellray.data.h5ad import H5adFile
from cellray.data.sketch import MAX_GENES, SketchBuilder, StoredSketch, sketch_counts
from cellray.data.sources import Cells, Counts, blocks
from cellray.data.staging import link_tree
from cellray.data.writer import create_x, write_rows

__all__ = [
    "PART_BLOCKS",
    "Part",
    "Spool",
    "adopt",
    "digest_of",
    "discard_others",
    "figures",
    "give_back",
    "leave",
    "prepare",
    "sketch_of",
]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Tick = Callable[[int], None]

PART_BLOCKS = 4  # blocks of a part: what is done again, at most, of an interrupted ingest
_TEMPLATE = "template"
_FORMAT = "1"
_ANY_CELLS = 1 << 40  # the template's shape; a part does not depend on how large the store gets


def digest_of(*items: object) -> str:
    """A folder's name from all that its content depends on."""
    digest = hashlib.sha256(_FORMAT.encode())
    for item in items:
        data = item.tobytes() if isinstance(item, np.ndarray) else repr(item).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Spool:
    """Turning the counts of a file from columns into rows.

    Attributes:
        path: the file.
        layer: its layer.
        stamp: size and time of the file.
        num_cells: cells of the file.
        cells_per_block: rows that are read back at a time.
    """

    path: str
    layer: str
    stamp: tuple[int, int]
    num_cells: int
    cells_per_block: int

    @property
    def key(self) -> str:
        """Name of its folder."""
        place = os.path.abspath(self.path)
        return digest_of("spool", place, self.layer, self.stamp, self.cells_per_block)

    def run(self, folder: Path, tick: Tick) -> None:
        """Do it, under ``folder``."""
        with H5adFile(self.path) as file:
            file.spool(self.layer, folder / self.key, self.cells_per_block)
        tick(self.num_cells)


def leave(
    folder: Path,
    key: str,
    work: Callable[[Any, Path], Mapping[str, npt.NDArray[Any]]],
    *,
    writes: bool = True,
) -> None:
    """Do a part's work, so that its folder appears whole or not at all; nothing if it is there.

    Args:
        folder: of all parts, as :func:`prepare` made it.
        key: the part's folder.
        work: gets the part's X, open for writing (None without ``writes``), and the folder that
            is being made, and returns the figures.
        writes: whether the part has an X.

    Raises:
        DataError: of ``work``; or the folder cannot be written.
    """
    if (folder / key).exists():
        return
    making = folder / f"{key}.{uuid.uuid4().hex[:8]}"
    try:
        making.mkdir()
        if writes:
            shutil.copytree(folder / _TEMPLATE, making / "X")
            with tiledbsoma.open(str(making / "X"), "w") as x:
                found = work(x, making)
        else:
            found = work(None, making)
        np.savez(making / "figures.npz", **found)  # type: ignore[arg-type]
        making.rename(folder / key)
        give_back()
    except (tiledbsoma.SOMAError, OSError) as error:
        raise DataError(f"writing '{making}' failed: {error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


class _Keyed(Protocol):
    @property
    def key(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of one file.

    Attributes:
        number: the file's number, from 1.
        counts: where the counts are and what they become.
        stamp: size and time of the file.
        rows: the first row and the one after the last.
        cells_per_block: rows at a time.
        gene_hashes: (V,) hash of each gene.
        mito: (V,) which genes are mitochondrial.
        measured: whether cells are hashed and summed; not if an earlier reading did.
        joinids: (N,) where each cell goes, -1 for those left out; None writes nothing.
    """

    number: int
    counts: Counts
    stamp: tuple[int, int]
    rows: tuple[int, int]
    cells_per_block: int
    gene_hashes: U64
    mito: npt.NDArray[np.bool_]
    measured: bool
    joinids: I64 | None

    @property
    def num_cells(self) -> int:
        """N."""
        return self.rows[1] - self.rows[0]

    @property
    def key(self) -> str:
        """Name of its folder: decided by all that its content depends on."""
        used = self.counts.rows[self.counts.rows >= 0]
        return digest_of(
            "part 2",  # the form of what it leaves
            os.path.abspath(self.counts.path),
            self.stamp,
            self.counts.layer,
            self.counts.rows,
            self.rows,
            self.cells_per_block,
            self.gene_hashes[used],
            self.mito[used],
            self.measured,
            "" if self.joinids is None else self.joinids,
        )

    def run(self, folder: Path, tick: Tick) -> None:
        """Read and write it, under ``folder``; nothing to do if that was done before.

        Args:
            folder: of all parts, as :func:`prepare` made it.
            tick: is told the cells of each block that is done.

        Raises:
            DataError: the file cannot be read, a value is no raw count, or the disk is full.
        """
        leave(
            folder,
            self.key,
            lambda x, making: self._read(x, tick, making),
            writes=self.joinids is not None,
        )

    def _read(self, x: Any, tick: Tick, making: Path) -> Mapping[str, npt.NDArray[Any]]:
        cells, sketch = Cells(), SketchBuilder()
        gene_cells = np.zeros(len(self.gene_hashes), np.int64)
        row = 0
        for block in blocks(self.counts, self.cells_per_block, rows=self.rows):
            if self.measured:
                cells.add(block, self.gene_hashes, self.mito)
            if self.joinids is not None:
                joinids = self.joinids[row : row + block.shape[0]]
                kept = _kept(block, joinids)
                write_rows(x, kept, np.sort(joinids[joinids >= 0]))
                gene_cells += np.bincount(kept.indices, minlength=len(gene_cells))
                sizes = np.asarray(kept.sum(axis=1, dtype=np.float64)).ravel()
                sketch.add(sketch_counts(kept.indptr, kept.indices, kept.data, sizes))
            row += block.shape[0]
            tick(block.shape[0])
        last = int(np.flatnonzero(gene_cells)[-1]) + 1 if gene_cells.any() else 0
        StoredSketch.write(making, sketch.result())
        return {**cells.joined(), "gene_cells": gene_cells[:last]}


def _kept(block: sparse.csr_matrix, joinids: I64) -> sparse.csr_matrix:
    """The rows that are written, in the order of their joinids."""
    kept = np.flatnonzero(joinids >= 0)
    order = kept[np.argsort(joinids[kept], kind="stable")]
    whole = len(order) == block.shape[0] and bool((np.diff(order) == 1).all())
    return block if whole else block[order]


@lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def give_back() -> None:
    """Give memory that is free but kept by the C library, or by Arrow, back to the system.

    The library keeps what many threads have let go (over 100 MB after some parts), so that a
    long ingest would look as if it grew.
    """
    pa.default_memory_pool().release_unused()
    trim = getattr(_libc(), "malloc_trim", None)  # not in every C library
    if trim is not None:
        trim(0)


def prepare(folder: Path) -> None:
    """Make the folder of the parts, and put away what an interrupted ingest left half done."""
    folder.mkdir(parents=True, exist_ok=True)
    for place in folder.iterdir():
        if "." in place.name:
            shutil.rmtree(place, ignore_errors=True)
    if not (folder / _TEMPLATE).exists():
        making = folder / f"{_TEMPLATE}.{uuid.uuid4().hex[:8]}"
        create_x(making, (_ANY_CELLS, MAX_GENES))
        making.rename(folder / _TEMPLATE)


def discard_others(folder: Path, keys: set[str]) -> int:
    """Remove the parts of another command; returns how many there were."""
    others = [p for p in folder.iterdir() if p.name not in keys and p.name != _TEMPLATE]
    for place in others:
        shutil.rmtree(place, ignore_errors=True)
    return len(others)


def figures(folder: Path, part: _Keyed) -> dict[str, npt.NDArray[Any]]:
    """What a finished part measured of its cells: ``hashes``, ``sums``, ``nonzero``, ``mito``.

    A part of a relayout has no ``mito``.
    """
    with np.load(folder / part.key / "figures.npz") as found:
        names = ("hashes", "sums", "nonzero", "mito")
        return {name: found[name] for name in names if name in found}


def sketch_of(folder: Path, part: _Keyed) -> tuple[I64, StoredSketch]:
    """What a finished part measured of the genes: cells that express each, and the sketch."""
    with np.load(folder / part.key / "figures.npz") as found:
        return found["gene_cells"], StoredSketch(folder / part.key)


def adopt(folder: Path, part: _Keyed, x: Path) -> None:
    """Give the fragments of a finished part to the array at ``x``, sharing the files."""
    for kind in ("__schema", "__fragments", "__commits"):
        for item in (folder / part.key / "X" / kind).iterdir():
            place = x / kind / item.name
            if not place.exists():
                link_tree(item, place)
