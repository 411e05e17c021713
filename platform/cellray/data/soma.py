"""Reading a SOMA experiment, ours or one of the CELLxGENE Census: genes, cells, blocks of counts.

A :class:`Store` is a locator. It travels to other processes as a few strings and opens its handle
where it is first used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import tiledbsoma

from cellray.core.blocks import CellBlock
from cellray.core.errors import DataError, did_you_mean
from cellray.data import schema, snapshot
from cellray.data.digest import content_digest, digest_of_cells, keys_of_cells
from cellray.data.files import fragments
from cellray.data.locate import address, local_path
from cellray.data.opening import open_experiment
from cellray.data.retry import read_with_retry
from cellray.data.rows import RowGatherer
from cellray.data.storage import Settings, brief, iso, may_pass, now_ms, parse_moment, past_moment
from cellray.data.vocab import strip_version

__all__ = ["Store", "open_store"]

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
T = TypeVar("T")

_MANY = 10  # of so many cells one is asked for: then rows are named, else all are read
_COUNT_PLAIN_CELLS = 1_000_000  # beyond this, plain string columns are not counted for `show`


def _require(uri: str, what: str, name: str, allowed: Sequence[str]) -> None:
    if name not in allowed:
        raise DataError(
            f"'{uri}' has no {what} '{name}'.{did_you_mean(name, allowed)} It has: "
            f"{', '.join(sorted(allowed)) or 'none'}; set data.{what}"
        )


def open_store(
    uri: str,
    *,
    measurement: str = schema.MEASUREMENT,
    layer: str = schema.LAYER,
    timestamp: str = "",
    tiledb: Mapping[str, str] | None = None,
) -> Store:
    """Open a SOMA experiment for reading.

    Args:
        uri: a local folder or an object-store URI; one of our stores or a Census organism, e.g.
            ``.../homo_sapiens``; or ``census:2025-01-30/homo_sapiens``, see
            :func:`cellray.data.census.locate_census`.
        measurement: its measurement.
        layer: the X layer with raw counts.
        timestamp: the moment whose cells and genes are seen, ISO 8601, UTC where it names no
            zone; "" is now. What is appended after it is not seen.
        tiledb: TileDB settings, see :func:`cellray.data.storage.settings`.

    Raises:
        ConfigError: a setting or timestamp that is not allowed.
        DataError: there is no store, or there was none at that time; it is not a SOMA experiment,
            its ingest was interrupted, it was written by a newer cellray, or it lacks the
            measurement or layer.
    """
    place, options = address(uri, tiledb)
    asked = past_moment(timestamp) if timestamp else None

    def look() -> Store:
        try:
            return _look(place, options, asked, measurement, layer)
        except (tiledbsoma.SOMAError, OSError, RuntimeError) as error:
            raise DataError(f"'{uri}' cannot be read: {brief(error)}") from error

    return read_with_retry(look, what=lambda: f"'{uri}'", tries=2)


def _look(uri: str, options: Settings, asked: int | None, measurement: str, layer: str) -> Store:
    """What an experiment holds, at a moment (ms) or now."""
    experiment = open_experiment(uri, options)
    ours = schema.META_FORMAT in experiment.metadata
    until = now_ms() if asked is None else asked
    if not ours:  # TileDB itself keeps the past of what is appended to in place
        experiment = open_experiment(uri, options, at_ms=until)
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
    num_rows, num_genes = map(int, experiment.ms[measurement].X[layer].shape)
    num_cells = int(experiment.obs.count)
    if not ours:  # the shape of a foreign X may be a limit, not a size
        num_genes = min(num_genes, int(experiment.ms[measurement].var.count))
    elif asked is not None:
        ledger = json.loads(experiment.metadata.get(schema.META_LEDGER, "[]"))
        num_rows, num_genes = snapshot.size_at(uri, ledger, asked, measurement=measurement)
        num_cells = num_rows
    return Store(
        uri=uri,
        measurement=measurement,
        layer=layer,
        num_cells=num_cells,
        shape=(num_rows, num_genes),
        timestamp="" if ours else iso(until),
        tiledb=options,
    )


@dataclass(frozen=True)
class Store:
    """A locator of one X layer of a SOMA experiment; get one from :func:`open_store`.

    Pickles as a few words; each process opens its own handle, with the same settings. It means the
    store as it was at the time asked for, or when it was opened: cells and genes that are appended
    later, even while it is in use, are not seen. Of a store that cellray wrote the obs columns are
    those of today; one that came later is null in older cells.

    Attributes:
        uri: absolute path or object-store URI.
        measurement: the measurement that holds ``var`` and ``X``.
        layer: the X layer that is read.
        num_cells: cells in obs.
        shape: (rows, V) of X; joinids are below ``rows``. Other writers may leave gaps.
        timestamp: the moment at which TileDB looks at a store of other writers; "" for one of ours,
            of which ``shape`` says what is seen.
        tiledb: TileDB settings, sorted pairs.
    """

    uri: str
    measurement: str
    layer: str
    num_cells: int
    shape: tuple[int, int]
    timestamp: str = ""
    tiledb: Settings = ()

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _open(self) -> Any:
        at_ms = parse_moment(self.timestamp) if self.timestamp else None
        return open_experiment(self.uri, self.tiledb, at_ms=at_ms)

    def _reopen(self) -> None:
        """Drop the handles: the next read opens new ones."""
        for name in ("_experiment", "_x"):
            self.__dict__.pop(name, None)

    def _retried(self, read: Callable[[], T], what: Callable[[], str]) -> T:
        return read_with_retry(read, what=what, reopen=self._reopen)

    @cached_property
    def _experiment(self) -> Any:
        return self._open()

    @cached_property
    def _x(self) -> Any:
        return self._experiment.ms[self.measurement].X[self.layer]

    def _asked(self, what: str, read: Callable[[Any], T]) -> T:
        """Read from a new handle, again if the storage fails."""

        def once() -> T:
            try:
                with self._open() as experiment:
                    return read(experiment)
            except (tiledbsoma.SOMAError, OSError, RuntimeError) as error:
                raise DataError(f"{what} of '{self.uri}' cannot be read: {error}") from error

        return self._retried(once, lambda: f"{what} of '{self.uri}'")

    @cached_property
    def _var(self) -> pd.DataFrame:
        table = self._asked("var", lambda e: e.ms[self.measurement].var.read().concat())
        frame = schema.to_pandas(table).sort_values(schema.JOINID, ignore_index=True)
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
        return self._asked("obs", lambda e: {f.name: f.type for f in e.obs.schema})

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
        return self._retried(
            lambda: self._read_obs(names, value_filter, coords), lambda: f"obs of '{self.uri}'"
        )

    def _read_obs(
        self, names: list[str] | None, value_filter: str | None, coords: tuple[pa.Array, ...]
    ) -> pa.Table:
        # opened anew each time: a handle kept over an append would look for pieces that are gone
        with self._open() as experiment:
            try:
                obs = experiment.obs
            except (tiledbsoma.SOMAError, OSError, RuntimeError) as e:
                raise DataError(f"obs of '{self.uri}' cannot be opened: {e}") from e
            try:
                reader = obs.read(coords, column_names=names, value_filter=value_filter or None)
            except (tiledbsoma.SOMAError, OSError, SyntaxError, ValueError, TypeError) as error:
                if not value_filter or may_pass(error):
                    raise DataError(f"obs of '{self.uri}' cannot be read: {error}") from error
                reason = str(error).split("\n")[0].removeprefix("SOMAError: ")
                raise DataError(
                    f'obs filter "{value_filter}" is not understood: {reason}. Write it like '
                    f"\"donor == 'd1' and nnz >= 200\"; columns: {', '.join(self._obs_types)}"
                ) from None  # without a cause: it is not tried again
            try:
                table = reader.concat()
            except (tiledbsoma.SOMAError, OSError, RuntimeError) as error:
                raise DataError(f"obs of '{self.uri}' cannot be read: {error}") from error
            return table.filter(pc.field(schema.JOINID) < self.shape[0])

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
        frame = schema.to_pandas(self._obs_table(columns, value_filter=value_filter, joinids=None))
        return frame.sort_values(schema.JOINID, ignore_index=True)

    def _check_request(self, joinids: I64) -> None:
        if len(joinids) == 0:
            return
        low, high = int(joinids[0]), int(joinids[-1])
        last = self.shape[0] - 1
        if low < 0 or high > last:
            wrong = low if low < 0 else high
            raise DataError(f"joinid {wrong} is not in '{self.uri}' (0 .. {last})")
        for twice in joinids[1:][joinids[1:] == joinids[:-1]]:
            raise DataError(f"joinid {int(twice)} is asked for more than once in one block")

    def _read_rows(self, joinids: I64, gene_map: I32) -> RowGatherer:
        """Read N cells, at least one, into compressed rows."""
        ascending = np.sort(joinids)
        self._check_request(ascending)
        low, high = int(ascending[0]), int(ascending[-1])
        whole_range = high - low + 1 == len(joinids)
        coords = slice(low, high) if whole_range else pa.array(ascending)
        gathered = RowGatherer(joinids, gene_map)
        try:
            for table in self._x.read((coords,)).tables():
                gathered.add(*(table.column(i).to_numpy() for i in range(3)))
        except (tiledbsoma.SOMAError, OSError, RuntimeError) as error:
            raise DataError(f"X/{self.layer} of '{self.uri}' cannot be read: {error}") from error
        return gathered

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
        if len(wanted) == 0:
            nothing = np.zeros(0, dtype=np.float32)
            genes = np.zeros(0, dtype=np.int32)
            return CellBlock(wanted, np.zeros(1, dtype=np.int64), genes, nothing, nothing)
        gathered = self._retried(
            lambda: self._read_rows(wanted, gene_map), lambda: self._named(wanted)
        )
        indptr, genes, counts, library_sizes = gathered.rows()
        return CellBlock(
            joinids=wanted,
            indptr=indptr,
            genes=genes,
            counts=counts,
            library_sizes=library_sizes,
            obs=self._obs_arrays(wanted, obs) if obs else {},
        )

    def _named(self, joinids: I64) -> str:
        span = f"{len(joinids)} cells from joinid {joinids.min()} to {joinids.max()}"
        return f"X/{self.layer} of '{self.uri}', {span},"

    def _obs_arrays(
        self, joinids: I64, columns: Sequence[str]
    ) -> Mapping[str, npt.NDArray[np.generic]]:
        table = self._obs_table(columns, value_filter=None, joinids=np.sort(joinids))
        frame = schema.to_pandas(table).set_index(schema.JOINID).reindex(joinids)
        if len(table) < len(joinids):
            gone = joinids[~np.isin(joinids, table.column(schema.JOINID).to_numpy())]
            raise DataError(f"joinid {int(gone[0])} is not in obs of '{self.uri}'")
        return {
            name: frame[name].astype(object).to_numpy()
            if isinstance(frame[name].dtype, pd.CategoricalDtype)
            else frame[name].to_numpy()
            for name in columns
        }

    def fingerprint(self, joinids: I64) -> str:
        """SHA-256 that says which cells, and which counts of them, a run was given.

        Of a store that cellray wrote: the given cells' ids and the hash of their counts that obs
        keeps, whatever their order or place, so that the same cells in another store agree.

        Of other stores, without reading X: the names of its fragments, which TileDB gives at
        random and whose contents never change, with the genes and the joinids. A copy of the store
        agrees; after any write to its X up to ``timestamp``, even of other cells, it does not.
        Where fragments cannot be listed, address and timestamp stand for them.

        Args:
            joinids: (N,) distinct joinids.
        """
        ascending = np.sort(np.asarray(joinids, dtype=np.int64))
        self._check_request(ascending)
        if len(ascending) == 0:
            return content_digest([], np.zeros(0, dtype=np.uint64))
        # the hash in obs is of the counts of RNA
        if schema.CELL_HASH not in self._obs_types or self.measurement != schema.MEASUREMENT:
            return self._snapshot_digest(ascending)
        return self._streamed(digest_of_cells, ascending, schema.CELL_HASH)

    def _streamed(self, use: Callable[[Any, I64, str], T], ascending: I64, *columns: str) -> T:
        """Hand some cells' ids and columns of obs to a function, a piece at a time."""
        name = next((c for c in schema.CELL_IDS if c in self._obs_types), schema.JOINID)
        names = list(dict.fromkeys([schema.JOINID, name, *columns]))
        few = len(ascending) < self.num_cells // _MANY
        coords = (pa.array(ascending),) if few else ()
        return self._asked(
            "obs", lambda e: use(e.obs.read(coords, column_names=names), ascending, name)
        )

    def cell_keys(self, joinids: I64) -> npt.NDArray[np.uint64]:
        """(N,) hash of each cell's own id, wherever it lies; of its joinid if obs has no ids.

        Args:
            joinids: (N,) ascending.
        """
        self._check_request(joinids)
        if len(joinids) == 0:
            return np.zeros(0, dtype=np.uint64)
        return self._streamed(keys_of_cells, joinids)

    def _snapshot_digest(self, ascending: I64) -> str:
        until = parse_moment(self.timestamp) if self.timestamp else None
        uri = self._asked("X", lambda e: str(e.ms[self.measurement].X[self.layer].uri))
        names = self._retried(
            lambda: fragments(uri, self.tiledb, until_ms=until), lambda: f"'{uri}'"
        )
        if names is None:
            names = [uri, self.timestamp]
        genes = [strip_version(g) for g in self._var["feature_id"]]
        return snapshot.digest(names, genes, ascending)

    def nonzero_medians(self) -> npt.NDArray[np.float32]:
        """(V,) median of each gene's normalised counts over the cells that express it, 1.0 if none.

        Over all cells of the store, to within 0.4 %, as ingest has kept them.

        Raises:
            DataError: the store has none; says what to do.
        """
        found = self._asked("var", lambda e: e.ms[self.measurement].var.read().concat())
        if schema.NONZERO_MEDIAN not in found.column_names:
            raise DataError(
                f"'{self.uri}' keeps no non-zero medians (var has no '{schema.NONZERO_MEDIAN}'); "
                "take data.statistics = 'train', or ingest the cells with cellray"
            )
        frame = found.to_pandas().sort_values(schema.JOINID)
        return np.asarray(frame[schema.NONZERO_MEDIAN], dtype=np.float32)[: self.num_genes]

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """What was ingested: one entry a file; empty for a store that we did not write."""
        text = self._asked("metadata", lambda e: e.metadata.get(schema.META_LEDGER, "[]"))
        return snapshot.entries_of(json.loads(text), self.shape[0])

    def _distinct(self, name: str, kind: pa.DataType) -> int | None:
        if pa.types.is_dictionary(kind):
            return self._asked("obs", lambda e: len(e.obs.get_enumeration_values([name])[name]))
        if self.num_cells > _COUNT_PLAIN_CELLS:
            return None
        column = self._obs_table([name], value_filter=None, joinids=None).column(name)
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
            "layers": self._asked("X", lambda e: sorted(e.ms[self.measurement].X)),
            "measurements": self._asked("its measurements", lambda e: sorted(e.ms)),
            "cells": self.num_cells,
            "genes": self.num_genes,
            "obs_columns": columns,
            "files": self.ledger,
            "bytes_on_disk": size,
        }
