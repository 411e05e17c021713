"""Reading one h5ad file block by block: its cells, its genes, and which of its layers hold counts.

A modality of an h5mu file (MuData) is an h5ad in a group: ``x.h5mu::atac``; ``x.h5mu`` is its RNA.

Nothing but obs, var and one block of rows is held in memory. A matrix stored by columns is turned
into rows on disk first (:mod:`cellray.data.spool`), because no row of it can be read alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from scipy import sparse

from cellray.core.errors import DataError, did_you_mean
from cellray.data.spool import RowSpool, spool_rows

__all__ = ["MAX_BLOCK", "MODALITY", "OBSM", "H5adFile", "check_counts", "file_of"]

MAX_COUNT = 1 << 24  # float32 holds every whole number up to here
MAX_BLOCK = (1 << 31) - 1  # stored values of one block: offsets are int32 further on
MODALITY = "::"  # "x.h5mu::atac"
OBSM = "obsm/"  # "obsm/protein_counts" is a layer too: a matrix or a table of numbers
_PROBE_VALUES = 65_536
_IDS_AT_ONCE = 65_536
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
    if len(values) and float(values.max()) > MAX_COUNT:
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


def _split(path: str | Path) -> tuple[Path, str]:
    """The file, and the modality of an h5mu, "" for an h5ad."""
    name, _, modality = str(path).partition(MODALITY)
    return Path(name), modality or ("rna" if name.endswith(".h5mu") else "")


def file_of(path: str | Path) -> Path:
    """The file that ``path`` names, without a modality."""
    return _split(path)[0]


class H5adFile:
    """An open h5ad file, or a modality of an h5mu file.

    Args:
        path: a local file; for h5mu with the modality, ``x.h5mu::atac``.

    Raises:
        DataError: the file is missing, truncated, not HDF5 or not an h5ad.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, modality = _split(path)
        self._handle = self._open()
        try:
            self._file = self._modality(modality) if modality else self._handle
            self._check_parts()
            self.num_cells = self._length("obs")
        except BaseException:
            self._handle.close()
            raise

    def __enter__(self) -> H5adFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._handle.close()

    def _modality(self, name: str) -> h5py.Group:
        allowed = sorted(self._handle["mod"]) if "mod" in self._handle else []
        if name not in allowed:
            raise DataError(
                f"'{self.path}' has no modality '{name}'.{did_you_mean(name, allowed)} It has: "
                f"{', '.join(allowed) or 'none: it is no h5mu file'}"
            )
        return self._handle["mod"][name]

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

    def _ids(self, part: str) -> Any:
        """The HDF5 node with the ids of obs or var."""
        group = self._file[part]
        try:
            return group[group.attrs.get("_index", "_index")]
        except _READ_ERRORS as error:
            raise self._unreadable(f"the ids of {part}", error) from error

    def _length(self, part: str) -> int:
        node = self._ids(part)
        return len(node) if isinstance(node, h5py.Dataset) else len(anndata.io.read_elem(node))

    def ids(self, part: str = "obs") -> pa.LargeStringArray:
        """The ids of obs or var as text."""
        node = self._ids(part)
        try:
            if not (isinstance(node, h5py.Dataset) and h5py.check_string_dtype(node.dtype)):
                values = np.asarray(anndata.io.read_elem(node))
                return pa.array([str(v) for v in values], pa.large_string())
            return _texts(node)
        except _READ_ERRORS as error:
            raise self._unreadable(f"the ids of {part}", error) from error

    def _frame(self, part: str) -> pd.DataFrame:
        try:
            frame = anndata.io.read_elem(self._file[part])
        except _READ_ERRORS as error:
            raise self._unreadable(part, error) from error
        if not isinstance(frame, pd.DataFrame):
            raise DataError(f"'{self.path}': {part} is not a table but a {type(frame).__name__}")
        return frame

    def obs(self) -> Iterator[tuple[str, pd.Series | pa.Array]]:
        """The columns of obs, one at a time, plain text as Arrow: obs is never held twice."""
        group = self._file["obs"]
        if "column-order" not in group.attrs or "__categories" in group:  # before AnnData 0.8
            frame = self._frame("obs")
            yield from ((str(name), frame[name]) for name in frame.columns)
            return
        for name in group.attrs["column-order"]:
            try:
                node = group[name]
                text = isinstance(node, h5py.Dataset) and h5py.check_string_dtype(node.dtype)
                values = _texts(node) if text else anndata.io.read_elem(node)
            except _READ_ERRORS as error:
                raise self._unreadable(f"obs column {name}", error) from error
            if len(values) != self.num_cells:
                raise DataError(
                    f"'{self.path}': obs column '{name}' has {len(values)} values for "
                    f"{self.num_cells} cells"
                )
            yield str(name), values if text else pd.Series(values)

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
        if layer.startswith(OBSM):
            return self._obsm(layer.removeprefix(OBSM))
        if layer not in self.layers:
            raise DataError(
                f"'{self.path}' has no layer '{layer}'.{did_you_mean(layer, self.layers)} It has: "
                f"{', '.join(self.layers) or 'none'}"
            )
        key = {"X": "X", "raw.X": "raw/X"}.get(layer, f"layers/{layer}")
        return self._file[key]

    def _obsm(self, name: str) -> Any:
        allowed = sorted(self._file["obsm"]) if "obsm" in self._file else []
        if name not in allowed:
            raise DataError(
                f"'{self.path}' has no obsm '{name}'.{did_you_mean(name, allowed)} It has: "
                f"{', '.join(allowed) or 'none'}"
            )
        return self._file["obsm"][name]

    def obsm_names(self, name: str) -> list[str]:
        """Names of an obsm's columns: the table's, or those in uns, else 0 .. n-1.

        For ``obsm["protein_counts"]`` uns is looked up for ``protein_counts_names``, then for
        ``protein_names``.

        Raises:
            DataError: no such obsm, or names that do not fit it.
        """
        node = self._obsm(name)
        if self._form(node) == "table":
            return [str(c) for c in node.attrs["column-order"]]
        width = self.shape(OBSM + name)[1]
        uns = self._file.get("uns", {})
        stem = name.rpartition("_")[0]  # protein_counts -> protein_names
        key = next((k for k in (f"{name}_names", f"{stem}_names") if k in uns), None)
        if key is None:
            return [str(i) for i in range(width)]
        names = [str(n) for n in np.asarray(anndata.io.read_elem(uns[key])).ravel()]
        if len(names) != width:
            raise DataError(
                f"'{self.path}': uns['{key}'] has {len(names)} names for {width} columns of "
                f"obsm['{name}']"
            )
        return names

    @staticmethod
    def _form(node: Any) -> str:
        """``csr``, ``csc``, ``dense`` or ``table`` (a data frame in obsm)."""
        if isinstance(node, h5py.Dataset):
            return "dense"
        if "column-order" in node.attrs:
            return "table"
        kind = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", ""))
        kind = kind.decode() if isinstance(kind, bytes) else str(kind)
        return "csc" if kind.startswith("csc") else "csr"

    def by_columns(self, layer: str) -> bool:
        """Whether ``layer`` is stored by columns, so that reading rows needs a spool."""
        return self._form(self._node(layer)) == "csc"

    def shape(self, layer: str) -> tuple[int, int]:
        """(cells, genes) of a layer.

        Raises:
            DataError: no such layer.
        """
        node = self._node(layer)
        if isinstance(node, h5py.Dataset):
            return int(node.shape[0]), int(node.shape[1])
        if self._form(node) == "table":
            return self.num_cells, len(node.attrs["column-order"])
        shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
        return int(shape[0]), int(shape[1])

    def _probe(self, layer: str) -> _Verdict:
        """Judge a layer by its first, middle and last values."""
        node = self._node(layer)
        if self._form(node) == "table":
            return _judge(_columns(node, 0, _PROBE_VALUES))
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
        if layer.startswith(OBSM):
            return " Give another obsm, or another file, with the raw counts"
        others = [n for n in self.layers if n != layer and self._probe(n).raw]
        if not others:
            return " No other layer of the file holds them."
        listed = " or ".join(f"ingest.layer = '{n}'" for n in others)
        return f" They seem to be elsewhere in the file: set {listed}"

    def spool(self, layer: str, folder: Path, cells_per_block: int) -> RowSpool:
        """Turn a layer that is stored by columns into rows under ``folder``.

        Raises:
            DataError: it cannot be read.
        """
        try:
            shape = self.shape(layer)
            return spool_rows(self._node(layer), shape, folder, rows_per_band=cells_per_block)
        except _READ_ERRORS as error:
            raise self._unreadable(f"layer {layer}", error) from error

    def blocks(
        self,
        layer: str,
        cells_per_block: int,
        *,
        rows: tuple[int, int] | None = None,
        spool: Path | None = None,
    ) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Rows of ``layer`` in file order.

        Args:
            layer: as from :meth:`choose_layer`, or ``obsm/<name>``.
            cells_per_block: rows at a time.
            rows: the first row and the one after the last; None for all.
            spool: where a layer stored by columns was, or is to be, turned into rows; None
                does so in a temporary folder.

        Yields:
            (first row, (N, V) compressed rows; values as stored, zeros and order as stored).

        Raises:
            DataError: a block cannot be read, or would hold 2^31 values or more.
        """
        node = self._node(layer)
        form = self._form(node)
        begin, end = rows or (0, self.shape(layer)[0])
        with tempfile.TemporaryDirectory(prefix="cellray-") as scratch:
            place = spool or Path(scratch) / "rows"
            spooled = self.spool(layer, place, cells_per_block) if form == "csc" else None
            for first in range(begin, end, cells_per_block):
                last = min(first + cells_per_block, end)
                try:
                    if spooled is not None:
                        block = spooled.rows(first, last)
                    else:
                        block = self._read(node, form, first, last)
                except _READ_ERRORS as error:
                    what = f"cells {first}-{last} of layer {layer}"
                    raise self._unreadable(what, error) from error
                yield first, block

    def _read(self, node: Any, form: str, first: int, last: int) -> sparse.csr_matrix:
        if form == "table":
            return sparse.csr_matrix(_columns(node, first, last))
        if form == "dense":
            self._refuse_large(first, last, (last - first) * int(node.shape[1]))
            values = node[first:last]
            half = values.dtype == np.float16  # which scipy does not know
            return sparse.csr_matrix(values.astype(np.float32) if half else values)
        indptr = node["indptr"][first : last + 1].astype(np.int64)
        start, stop = int(indptr[0]), int(indptr[-1])
        self._refuse_large(first, last, stop - start)
        parts = (node["data"][start:stop], node["indices"][start:stop], indptr - start)
        num_genes = int(node.attrs.get("shape", node.attrs.get("h5sparse_shape"))[1])
        return sparse.csr_matrix(parts, shape=(last - first, num_genes))

    def _refuse_large(self, first: int, last: int, values: int) -> None:
        if values > MAX_BLOCK:
            fitting = max(1, int((last - first) * MAX_BLOCK / values))
            raise DataError(
                f"'{self.path}': cells {first}-{last - 1} hold {values:,} values, more than a "
                f"block's offsets can count (2^31 - 1); set cells_per_block to {fitting} or less"
            )


def _texts(node: h5py.Dataset) -> pa.LargeStringArray:
    """A dataset of strings as Arrow, without all of them as Python's."""
    text = node.asstr()
    parts = [
        pa.array(text[i : i + _IDS_AT_ONCE].tolist(), pa.large_string())
        for i in range(0, len(node), _IDS_AT_ONCE)
    ]
    return pa.concat_arrays(parts) if parts else pa.array([], pa.large_string())


def _columns(node: Any, first: int, last: int) -> npt.NDArray[Any]:
    """Rows of a data frame in obsm as a matrix."""
    parts = [np.asarray(node[name][first:last]) for name in node.attrs["column-order"]]
    return np.column_stack(parts) if parts else np.zeros((0, 0))
