"""Reading one h5ad file block by block: its cells, its genes, and which of its layers hold counts.

Nothing but obs, var and one block of rows is held in memory (a matrix stored by columns is the
exception: it is read whole, because no row of it can be read alone).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from cellray.core.errors import DataError, did_you_mean

__all__ = ["H5adFile", "check_counts"]

MAX_COUNT = 1 << 24  # float32 holds every whole number up to here
_PROBE_VALUES = 65_536
_READ_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError, EOFError)


@dataclass(frozen=True)
class _Verdict:
    """What a look at some values says: raw counts, or why not."""

    raw: bool
    reason: str = ""


def _judge(values: npt.NDArray[Any]) -> _Verdict:
    if values.dtype.kind == "b":
        return _Verdict(False, "holds true/false, not numbers")
    if values.dtype.kind not in "iuf":
        return _Verdict(False, f"holds {values.dtype}, not numbers")
    if not np.isfinite(values).all():
        bad = values[~np.isfinite(values)][0]
        return _Verdict(False, f"holds {bad}: missing or infinite values")
    if (values < 0).any():
        return _Verdict(False, f"holds negative values, e.g. {float(values[values < 0][0]):g}")
    fractions = values[values != np.floor(values)] if values.dtype.kind == "f" else values[:0]
    if len(fractions):
        example = float(fractions[0])
        looks = "looks log-normalised" if values.max() < 30 else "is not whole numbers"
        return _Verdict(False, f"{looks}, e.g. {example:g}")
    if len(values) and values.max() > MAX_COUNT:
        return _Verdict(False, f"holds {values.max():g}, more than float32 can count ({MAX_COUNT})")
    return _Verdict(True)


def check_counts(values: npt.NDArray[Any], *, where: str, advice: str = "") -> None:
    """Refuse values that are not raw counts: finite, not negative, whole.

    Args:
        values: numbers of any shape.
        where: the file and layer, for the message.
        advice: what to do, for the message.

    Raises:
        DataError: a value is not a raw count; the message gives an example.
    """
    verdict = _judge(values)
    if not verdict.raw:
        raise DataError(f"{where} {verdict.reason}. Raw counts are needed.{advice}")


class H5adFile:
    """An open h5ad file.

    Args:
        path: a local file.

    Raises:
        DataError: the file is missing, truncated, not HDF5 or not an h5ad.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = self._open()
        try:
            self._check_parts()
            self.num_cells = len(self._index("obs"))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> H5adFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def _open(self) -> h5py.File:
        if not self.path.is_file():
            folder = self.path.parent
            near = sorted(p.name for p in folder.glob("*.h5*")) if folder.is_dir() else []
            there = f" In {folder}: {', '.join(near[:8])}." if near else ""
            raise DataError(f"no file at '{self.path}'.{did_you_mean(self.path.name, near)}{there}")
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            if "truncated" in str(error):
                raise DataError(
                    f"'{self.path}' is truncated: it ends before the HDF5 file does. Copy or "
                    "download it again"
                ) from error
            raise DataError(f"'{self.path}' is not an h5ad (not an HDF5 file): {error}") from error

    def _check_parts(self) -> None:
        missing = [part for part in ("obs", "var") if part not in self._file]
        if missing:
            hint = ""
            if "matrix" in self._file:
                hint = (
                    " It looks like a 10x matrix: read it with scanpy.read_10x_h5 and write_h5ad."
                )
            lacks = " and no ".join(missing)
            raise DataError(f"'{self.path}' is HDF5 but not an h5ad: it has no {lacks}.{hint}")
        old = [part for part in ("obs", "var") if not isinstance(self._file[part], h5py.Group)]
        if old:
            raise DataError(
                f"'{self.path}' was written by an AnnData older than 0.7; open it there and save "
                "it again"
            )

    def _unreadable(self, what: str, error: Exception) -> DataError:
        return DataError(
            f"'{self.path}': cannot read {what} ({error}). The file is damaged or truncated; copy "
            "or download it again"
        )

    def _index(self, part: str) -> list[str]:
        """The ids of obs or var, as strings."""
        group = self._file[part]
        try:
            name = group.attrs.get("_index", "_index")
            values = anndata.io.read_elem(group[name])
        except _READ_ERRORS as error:
            raise self._unreadable(f"the ids of {part}", error) from error
        return [str(v) for v in np.asarray(values)]

    def _frame(self, part: str) -> pd.DataFrame:
        try:
            frame = anndata.io.read_elem(self._file[part])
        except _READ_ERRORS as error:
            raise self._unreadable(part, error) from error
        if not isinstance(frame, pd.DataFrame):
            raise DataError(f"'{self.path}': {part} is not a table but a {type(frame).__name__}")
        return frame

    def obs(self) -> pd.DataFrame:
        """The cells, indexed by cell id."""
        return self._frame("obs")

    def var(self, layer: str) -> pd.DataFrame:
        """The genes of ``layer``: ``raw.X`` has its own."""
        return self._frame("raw/var" if layer == "raw.X" else "var")

    @property
    def layers(self) -> list[str]:
        """What may hold counts: ``X``, ``raw.X`` and the named layers."""
        named = sorted(self._file["layers"]) if "layers" in self._file else []
        found = ["X"] if "X" in self._file and self._is_matrix("X") else []
        return found + (["raw.X"] if self._is_matrix("raw/X") else []) + named

    def _is_matrix(self, key: str) -> bool:
        node = self._file.get(key)
        if isinstance(node, h5py.Dataset):
            return bool(len(node.shape) == 2)
        return isinstance(node, h5py.Group) and {"data", "indices", "indptr"} <= set(node)

    def _node(self, layer: str) -> Any:
        if layer not in self.layers:
            raise DataError(
                f"'{self.path}' has no layer '{layer}'.{did_you_mean(layer, self.layers)} It has: "
                f"{', '.join(self.layers) or 'none'}"
            )
        key = {"X": "X", "raw.X": "raw/X"}.get(layer, f"layers/{layer}")
        return self._file[key]

    @staticmethod
    def _form(node: Any) -> str:
        """``csr``, ``csc`` or ``dense``."""
        if isinstance(node, h5py.Dataset):
            return "dense"
        kind = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", ""))
        kind = kind.decode() if isinstance(kind, bytes) else str(kind)
        return "csc" if kind.startswith("csc") else "csr"

    def shape(self, layer: str) -> tuple[int, int]:
        """(cells, genes) of a layer.

        Raises:
            DataError: no such layer.
        """
        node = self._node(layer)
        if isinstance(node, h5py.Dataset):
            return int(node.shape[0]), int(node.shape[1])
        shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
        return int(shape[0]), int(shape[1])

    def _probe(self, layer: str) -> _Verdict:
        """Judge a layer by its first, middle and last values."""
        node = self._node(layer)
        data = node if isinstance(node, h5py.Dataset) else node["data"]
        width = max(1, _PROBE_VALUES // int(np.prod(data.shape[1:], initial=1)))
        try:
            for start in sorted({0, len(data) // 2, max(0, len(data) - width)}):
                verdict = _judge(data[start : start + width])
                if not verdict.raw:
                    return verdict
        except _READ_ERRORS as error:
            raise self._unreadable(f"layer {layer}", error) from error
        return _Verdict(True)

    def choose_layer(self, wanted: str) -> str:
        """The layer to ingest.

        Args:
            wanted: ``X``, ``raw.X``, the name of a layer, or ``auto``: X if it holds raw counts,
                else raw.X if that does.

        Raises:
            DataError: no such layer, or it does not hold raw counts; says which ones do.
        """
        if not self.layers:
            raise DataError(f"'{self.path}' has no X, no raw.X and no layers: nothing to ingest")
        order = [n for n in ("X", "raw.X") if n in self.layers] if wanted == "auto" else [wanted]
        for name in order:
            if self._probe(name).raw:
                return name
        name = order[0] if order else self.layers[0]
        raise DataError(
            f"'{self.path}' layer {name} {self._probe(name).reason}. Raw counts are needed."
            f"{self.advice(name)}"
        )

    def advice(self, layer: str) -> str:
        """Where else in this file raw counts are, as the end of an error message."""
        others = [n for n in self.layers if n != layer and self._probe(n).raw]
        if not others:
            return " No other layer of the file holds them."
        listed = " or ".join(f"ingest.layer = '{n}'" for n in others)
        return f" They seem to be elsewhere in the file: set {listed}"

    def blocks(self, layer: str, cells_per_block: int) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Rows of ``layer`` in file order.

        Args:
            layer: as from :meth:`choose_layer`.
            cells_per_block: rows at a time.

        Yields:
            (first row, (N, V) compressed rows; values as stored, zeros and order as stored).

        Raises:
            DataError: a block cannot be read.
        """
        node = self._node(layer)
        form = self._form(node)
        num_cells, num_genes = self.shape(layer)
        try:
            whole = sparse.csr_matrix(anndata.io.read_elem(node)) if form == "csc" else None
            indptr = node["indptr"][:] if form == "csr" else None
        except _READ_ERRORS as error:
            raise self._unreadable(f"layer {layer}", error) from error
        for first in range(0, num_cells, cells_per_block):
            last = min(first + cells_per_block, num_cells)
            try:
                if whole is not None:
                    block = whole[first:last]
                elif indptr is None:
                    block = sparse.csr_matrix(node[first:last])
                else:
                    block = _rows(node, indptr, first, last, num_genes)
            except _READ_ERRORS as error:
                raise self._unreadable(f"cells {first}-{last} of layer {layer}", error) from error
            yield first, block


def _rows(
    node: Any, indptr: npt.NDArray[np.integer], first: int, last: int, num_genes: int
) -> sparse.csr_matrix:
    start, stop = int(indptr[first]), int(indptr[last])
    offsets = indptr[first : last + 1].astype(np.int64) - start
    parts = (node["data"][start:stop], node["indices"][start:stop], offsets)
    return sparse.csr_matrix(parts, shape=(last - first, num_genes))
