"""Turning a matrix stored by columns into rows, on disk: memory stays at a few blocks.

No row of a matrix stored by columns can be read alone. One pass counts the entries of each row;
a second one writes every entry into its band of rows in a temporary file. A band is then read
at once and has its rows.

Legend: N cells, V genes, Z stored entries.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

__all__ = ["RowSpool", "spool_rows"]

I64 = npt.NDArray[np.int64]
_CHUNK = 1 << 20  # entries handled at a time


def _record(kind: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype([("row", "<i4"), ("gene", "<i4"), ("value", kind)])


class RowSpool:
    """Rows of a matrix that was stored by columns.

    Args:
        folder: what :func:`spool_rows` made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with np.load(folder / "index.npz") as index:
            self._offsets: I64 = index["offsets"]
            self._band = int(index["band"])
            self._shape = (int(index["shape"][0]), int(index["shape"][1]))
            self._kind = np.dtype(str(index["kind"]))

    def _read(self, band: int) -> sparse.csr_matrix:
        start, stop = int(self._offsets[band]), int(self._offsets[band + 1])
        record = _record(self._kind)
        entries = np.fromfile(
            self._folder / "entries",
            dtype=record,
            count=stop - start,
            offset=start * record.itemsize,
        )
        rows = min(self._band, self._shape[0] - band * self._band)
        order = np.argsort(entries["row"], kind="stable")
        indptr = np.concatenate([[0], np.cumsum(np.bincount(entries["row"], minlength=rows))])
        parts = (entries["value"][order], entries["gene"][order], indptr)
        return sparse.csr_matrix(parts, shape=(rows, self._shape[1]))

    def rows(self, first: int, last: int) -> sparse.csr_matrix:
        """Rows ``first`` to ``last``, entries in the order of the columns."""
        parts = []
        for band in range(first // self._band, -(-last // self._band)):
            start = band * self._band
            inside = slice(max(first - start, 0), min(last - start, self._band))
            parts.append(self._read(band)[inside])
        return parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")


def _chunks(node: Any) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any], I64]]:
    """(rows, values, columns) of the stored entries, some at a time."""
    indptr = node["indptr"][:].astype(np.int64)
    total = int(indptr[-1])
    for start in range(0, total, _CHUNK):
        stop = min(start + _CHUNK, total)
        position = np.arange(start, stop, dtype=np.int64)
        columns = np.searchsorted(indptr, position, side="right") - 1
        yield node["indices"][start:stop], node["data"][start:stop], columns


def spool_rows(node: Any, shape: tuple[int, int], folder: Path, *, rows_per_band: int) -> RowSpool:
    """Write the rows of an h5ad matrix that is stored by columns under ``folder``.

    Needs 12 to 16 bytes of disk for each stored entry; a folder that is there is used as it is.

    Args:
        node: the HDF5 group with ``data``, ``indices`` and ``indptr``.
        shape: (N, V).
        folder: where to; appears whole or not at all.
        rows_per_band: rows that are read back at once.
    """
    if folder.exists():
        return RowSpool(folder)
    num_bands = -(-shape[0] // rows_per_band)
    per_band = np.zeros(num_bands, np.int64)
    total = int(node["indptr"][-1])
    for start in range(0, total, _CHUNK):
        bands = node["indices"][start : min(start + _CHUNK, total)] // rows_per_band
        per_band += np.bincount(bands, minlength=num_bands)
    offsets = np.concatenate([[0], np.cumsum(per_band)])
    record = _record(node["data"].dtype)
    making = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}")
    making.mkdir(parents=True)
    following = offsets[:-1].copy()
    with (making / "entries").open("wb") as file:
        for rows, values, columns in _chunks(node):
            band = rows // rows_per_band
            order = np.argsort(band, kind="stable")
            entries = np.empty(len(rows), dtype=record)
            entries["row"] = (rows % rows_per_band)[order]
            entries["gene"], entries["value"] = columns[order], values[order]
            counts = np.bincount(band, minlength=num_bands)
            ends = np.cumsum(counts)
            for b in np.flatnonzero(counts):
                part = entries[ends[b] - counts[b] : ends[b]]
                os.pwrite(file.fileno(), part.tobytes(), int(following[b]) * record.itemsize)
            following += counts
    np.savez(
        making / "index.npz",
        offsets=offsets,
        band=rows_per_band,
        shape=np.array(shape),
        kind=record["value"].str,
    )
    making.rename(folder)
    return RowSpool(folder)
