"""Reading a SOMA experiment, ours or one of the CELLxGENE Census: genes, cells, blocks of counts.

A :class:`Store` is a locator. It travels to other processes as a few strings and opens its handle
where it is first used. Reading a block is three linear passes: the coordinates as TileDB returns
them, a lookup table from joinid to row, and a counting sort into compressed rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import tiledbsoma
from scipy import sparse

from cellray.core.blocks import CellBlock
from cellray.core.errors import DataError, did_you_mean
from cellray.data import schema
from cellray.data.digest import cell_hashes, content_digest, hash64
from cellray.data.locate import local_path, refuse_missing
from cellray.data.rows import RowLookup, remap
from cellray.data.vocab import strip_version

__all__ = ["Store", "open_store"]

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
U64 = npt.NDArray[np.uint64]

_THREADS = 2  # each process of a machine that runs many; TileDB's default is one per core
_BUFFER_BYTES = 64 << 20
_HASH_CELLS = 4096
_COUNT_PLAIN_CELLS = 1_000_000  # beyond this, plain string columns are not counted for `show`


@lru_cache(maxsize=1)
def _context() -> Any:
    """The TileDB context of this process."""
    return tiledbsoma.SOMATileDBContext(
        tiledb_config={
            "sm.compute_concurrency_level": str(_THREADS),
            "sm.io_concurrency_level": str(_THREADS),
            "soma.init_buffer_bytes": str(_BUFFER_BYTES),
        }
    )


def _open_experiment(uri: str) -> Any:
    try:
        found = tiledbsoma.open(uri, context=_context())
    except (tiledbsoma.SOMAError, OSError, RuntimeError) as error:
        raise DataError(f"'{uri}' cannot be opened as a SOMA experiment: {error}") from error
    if found.soma_type != "SOMAExperiment":
        raise DataError(f"'{uri}' is a {found.soma_type}, not a SOMAExperiment")
    return found


def _require(uri: str, what: str, name: str, allowed: Sequence[str]) -> None:
    if name not in allowed:
        raise DataError(
            f"'{uri}' has no {what} '{name}'.{did_you_mean(name, allowed)} It has: "
            f"{', '.join(sorted(allowed)) or 'none'}; set data.{what}"
        )


def open_store(
    uri: str, *, measurement: str = schema.MEASUREMENT, layer: str = schema.LAYER
) -> Store:
    """Open a SOMA experiment for reading.

    Args:
        uri: a local folder or an object-store URI; one of our stores or a Census organism, e.g.
            ``.../homo_sapiens``.
        measurement: its measurement.
        layer: the X layer with raw counts.

    Raises:
        DataError: there is no store, it is not a SOMA experiment, its ingest was interrupted, it
            was written by a newer cellray, or it lacks the measurement or layer.
    """
    path = local_path(uri)
    if path is not None:
        refuse_missing(path)
    experiment = _open_experiment(str(path) if path is not None else uri)
    version = int(experiment.metadata.get(schema.META_FORMAT, schema.FORMAT_VERSION))
    if version > schema.FORMAT_VERSION:
        raise DataError(
            f"'{uri}' has store format {version}; this version of cellray reads up to "
            f"{schema.FORMAT_VERSION}: upgrade it"
        )
    if "obs" not in experiment or "ms" not in experiment:
        lacks = "obs" if "ms" in experiment else "ms"
        raise DataError(f"'{uri}' is a SOMA experiment without {lacks}")
    _require(uri, "measurement", measurement, list(experiment.ms))
    _require(uri, "layer", layer, list(experiment.ms[measurement].X))
    num_cells, num_genes = experiment.ms[measurement].X[layer].shape
    return Store(
        uri=str(path) if path is not None else uri,
        measurement=measurement,
        layer=layer,
        num_cells=int(experiment.obs.count),
        shape=(int(num_cells), int(num_genes)),
    )


@dataclass(frozen=True)
class Store:
    """A locator of one X layer of a SOMA experiment; get one from :func:`open_store`.

    Pickles as a few words; each process opens its own handle. It means the store as it was when it
    was opened: cells and genes that are appended later, even while it is in use, are not seen.

    Attributes:
        uri: absolute path or object-store URI.
        measurement: the measurement that holds ``var`` and ``X``.
        layer: the X layer that is read.
        num_cells: cells in obs.
        shape: (rows, V) of X; joinids are below ``rows``.
    """

    uri: str
    measurement: str
    layer: str
    num_cells: int
    shape: tuple[int, int]

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def _experiment(self) -> Any:
        return _open_experiment(self.uri)

    @cached_property
    def _x(self) -> Any:
        return self._experiment.ms[self.measurement].X[self.layer]

    @cached_property
    def _var(self) -> pd.DataFrame:
        with _open_experiment(self.uri) as experiment:
            table = experiment.ms[self.measurement].var.read().concat()
        frame = _to_pandas(table).sort_values(schema.JOINID, ignore_index=True)
        frame = frame.iloc[: self.num_genes]
        ids = next((c for c in schema.GENE_IDS if c in frame), None)
        names = next((c for c in schema.GENE_NAMES if c in frame), ids)
        if ids is None:
            raise DataError(
                f"var of '{self.uri}' has no gene ids: none of {', '.join(schema.GENE_IDS)} is "
                f"among {', '.join(map(str, frame.columns))}"
            )
        joinids = frame[schema.JOINID].to_numpy()
        if not np.array_equal(joinids, np.arange(self.num_genes)):
            raise DataError(f"var of '{self.uri}': joinids are not 0 .. {self.num_genes - 1}")
        return pd.DataFrame(
            {
                schema.JOINID: joinids,
                "feature_id": frame[ids].astype(str).astype(object),
                "feature_name": frame[names].astype(str).astype(object),
            }
        )

    @property
    def num_genes(self) -> int:
        """Genes of var, V."""
        return self.shape[1]

    def var(self) -> pd.DataFrame:
        """The V genes: columns ``soma_joinid``, ``feature_id``, ``feature_name``.

        Raises:
            DataError: the store names no gene ids.
        """
        return self._var.copy()

    @cached_property
    def _obs_types(self) -> dict[str, pa.DataType]:
        with _open_experiment(self.uri) as experiment:
            return {f.name: f.type for f in experiment.obs.schema}

    def obs_columns(self) -> list[str]:
        """Names of the obs columns, in the store's order."""
        return list(self._obs_types)

    def has_obs(self, column: str) -> bool:
        """Whether obs has a column of that name."""
        return column in self._obs_types

    def _obs_table(
        self, columns: Sequence[str] | None, *, value_filter: str | None, joinids: I64 | None
    ) -> pa.Table:
        allowed = list(self._obs_types)
        for name in columns or ():
            if name not in allowed:
                raise DataError(
                    f"obs of '{self.uri}' has no column '{name}'.{did_you_mean(name, allowed)} "
                    f"It has: {', '.join(allowed)}"
                )
        names = None if columns is None else list(dict.fromkeys([schema.JOINID, *columns]))
        coords = () if joinids is None else (pa.array(joinids),)
        # obs is opened anew each time: an append writes it afresh, and a handle kept over one
        # would look for pieces that are gone
        with _open_experiment(self.uri) as experiment:
            try:
                reader = experiment.obs.read(
                    coords, column_names=names, value_filter=value_filter or None
                )
                table = reader.concat()
                return table.filter(pc.field(schema.JOINID) < self.shape[0])
            except (tiledbsoma.SOMAError, SyntaxError, ValueError, TypeError) as error:
                if not value_filter:
                    raise DataError(f"obs of '{self.uri}' cannot be read: {error}") from error
                reason = str(error).split("\n")[0].removeprefix("SOMAError: ")
                raise DataError(
                    f'obs filter "{value_filter}" is not understood: {reason}. Write it like '
                    f"\"donor == 'd1' and nnz >= 200\"; columns: {', '.join(allowed)}"
                ) from error

    def obs(
        self, columns: Sequence[str] | None = None, *, value_filter: str | None = None
    ) -> pd.DataFrame:
        """Cells and what is known of them, in joinid order.

        Args:
            columns: obs columns; None for all. ``soma_joinid`` is always there.
            value_filter: rows to keep, in SOMA's filter language; it reaches the storage.

        Returns:
            One row a cell; string columns are categorical, with the labels that occur.

        Raises:
            DataError: an unknown column, or a filter that is not understood.
        """
        frame = _to_pandas(self._obs_table(columns, value_filter=value_filter, joinids=None))
        return frame.sort_values(schema.JOINID, ignore_index=True)

    def _check_request(self, joinids: I64) -> None:
        if len(joinids) == 0:
            return
        low, high = int(joinids[0]), int(joinids[-1])
        last = self.shape[0] - 1
        if low < 0 or high > last:
            wrong = low if low < 0 else high
            raise DataError(f"joinid {wrong} is not in '{self.uri}' (0 .. {last})")
        twice = joinids[1:][joinids[1:] == joinids[:-1]]
        if len(twice):
            raise DataError(f"joinid {int(twice[0])} is asked for more than once in one block")

    def _read_rows(self, joinids: I64) -> sparse.csr_matrix:
        """Counts of the given cells over all genes of the store, (N, V), genes ascending."""
        order = np.argsort(joinids, kind="stable")
        ascending = joinids[order]
        self._check_request(ascending)
        shape = (len(joinids), self.num_genes)
        if len(joinids) == 0:
            return sparse.csr_matrix(shape, dtype=np.float32)
        low, high = int(ascending[0]), int(ascending[-1])
        whole_range = high - low + 1 == len(joinids)
        coords = slice(low, high) if whole_range else pa.array(ascending)
        try:
            tables = list(self._x.read((coords,)).tables())
        except tiledbsoma.SOMAError as error:
            raise DataError(f"X/{self.layer} of '{self.uri}' cannot be read: {error}") from error
        rows = RowLookup(ascending, order)
        if not tables:
            return sparse.csr_matrix(shape, dtype=np.float32)
        row = np.concatenate([rows(t.column(0).to_numpy()) for t in tables])
        gene = np.concatenate([t.column(1).to_numpy().astype(np.int32) for t in tables])
        data = np.concatenate([t.column(2).to_numpy().astype(np.float32) for t in tables])
        matrix = sparse.coo_matrix((data, (row, gene)), shape=shape).tocsr()
        matrix.sort_indices()
        return matrix

    def read_block(
        self, joinids: I64, gene_map: I32, *, obs: Sequence[str] | None = None
    ) -> CellBlock:
        """Read cells in the order given, with their genes as vocabulary indices.

        Args:
            joinids: (N,) distinct joinids in any order.
            gene_map: (V,) vocabulary index of each gene of the store, -1 where there is none.
            obs: obs columns that go with the block.

        Returns:
            N cells; genes ascending within a cell, zero counts dropped, library sizes over all
            genes of the store.

        Raises:
            DataError: a joinid that the store lacks or that is asked for twice; a ``gene_map`` of
                another length than var; an unknown obs column.
        """
        wanted = np.asarray(joinids, dtype=np.int64)
        if gene_map.shape != (self.num_genes,):
            raise DataError(
                f"gene_map has {gene_map.shape} entries, var of '{self.uri}' has "
                f"{self.num_genes} genes"
            )
        matrix = self._read_rows(wanted)
        total = np.concatenate([[0.0], np.cumsum(matrix.data, dtype=np.float64)])
        library_sizes = np.diff(total[matrix.indptr]).astype(np.float32)
        indptr, genes, counts = remap(matrix, gene_map)
        return CellBlock(
            joinids=wanted,
            indptr=indptr,
            genes=genes,
            counts=counts,
            library_sizes=library_sizes,
            obs=self._obs_arrays(wanted, obs) if obs else {},
        )

    def _obs_arrays(
        self, joinids: I64, columns: Sequence[str]
    ) -> Mapping[str, npt.NDArray[np.generic]]:
        table = self._obs_table(columns, value_filter=None, joinids=np.sort(joinids))
        frame = _to_pandas(table).set_index(schema.JOINID).loc[joinids]
        return {
            name: frame[name].astype(object).to_numpy()
            if isinstance(frame[name].dtype, pd.CategoricalDtype)
            else frame[name].to_numpy()
            for name in columns
        }

    def _cell_ids(self, joinids: I64) -> list[str]:
        column = next((c for c in schema.CELL_IDS if c in self._obs_types), schema.JOINID)
        table = self._obs_table([column], value_filter=None, joinids=joinids)
        frame = _to_pandas(table).set_index(schema.JOINID, drop=False).loc[joinids]
        return [str(v) for v in frame[column]]

    def _hashes(self, joinids: I64) -> U64:
        """(N,) content hash of each cell, as written at ingest or computed from X."""
        # the hash in obs is of the RNA counts
        if self.measurement == schema.MEASUREMENT and schema.CELL_HASH in self._obs_types:
            found = self._obs_arrays(joinids, [schema.CELL_HASH])[schema.CELL_HASH]
            return found.astype(np.uint64)
        gene_hashes = hash64([strip_version(g) for g in self._var["feature_id"]])
        every_gene = np.arange(self.num_genes, dtype=np.int32)
        parts = [np.zeros(0, dtype=np.uint64)]
        for first in range(0, len(joinids), _HASH_CELLS):
            block = self.read_block(joinids[first : first + _HASH_CELLS], every_gene)
            parts.append(cell_hashes(block.indptr, block.genes, block.counts, gene_hashes))
        return np.concatenate(parts)

    def fingerprint(self, joinids: I64) -> str:
        """SHA-256 of the given cells: their ids and counts, not their order or place.

        Stores that we wrote keep a hash of each cell in obs; of others X is read.

        Args:
            joinids: (N,) distinct joinids.
        """
        ascending = np.sort(np.asarray(joinids, dtype=np.int64))
        self._check_request(ascending)
        if len(ascending) == 0:
            return content_digest([], np.zeros(0, dtype=np.uint64))
        return content_digest(self._cell_ids(ascending), self._hashes(ascending))

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """What was ingested: one entry a file; empty for a store that we did not write."""
        text = self._experiment.metadata.get(schema.META_LEDGER, "[]")
        found: list[dict[str, Any]] = json.loads(text)
        return found

    def _distinct(self, name: str, kind: pa.DataType) -> int | None:
        obs = self._experiment.obs
        if pa.types.is_dictionary(kind):
            return len(obs.get_enumeration_values([name])[name])
        if self.num_cells > _COUNT_PLAIN_CELLS:
            return None
        column = obs.read(column_names=[name]).concat().column(name)
        return len(column.drop_null().unique())

    def describe(self) -> dict[str, Any]:
        """What the store holds, JSON-like.

        Returns:
            ``uri``, ``measurement``, ``layer``, ``layers``, ``measurements``, ``cells``, ``genes``,
            ``obs_columns`` (name -> ``type``, and for strings ``distinct``: how many values; None
            where counting would mean reading more than a million), ``files`` (the ledger) and
            ``bytes_on_disk`` (None for an object store).
        """
        columns = {}
        for name, kind in self._obs_types.items():
            value = kind.value_type if pa.types.is_dictionary(kind) else kind
            text = pa.types.is_large_string(value) or pa.types.is_string(value)
            columns[name] = {"type": "string" if text else str(value)}
            if text:
                columns[name]["distinct"] = self._distinct(name, kind)  # type: ignore[assignment]
        path = local_path(self.uri)
        size = (
            None if path is None else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        )
        return {
            "uri": self.uri,
            "measurement": self.measurement,
            "layer": self.layer,
            "layers": sorted(self._experiment.ms[self.measurement].X),
            "measurements": sorted(self._experiment.ms),
            "cells": self.num_cells,
            "genes": self.num_genes,
            "obs_columns": columns,
            "files": self.ledger,
            "bytes_on_disk": size,
        }


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    """A frame whose categorical columns have only labels that occur."""
    frame = table.to_pandas()
    for name in frame.columns:
        if isinstance(frame[name].dtype, pd.CategoricalDtype):
            frame[name] = frame[name].cat.remove_unused_categories()
    return frame
