"""Rewriting a SOMA experiment, e.g. one of the CELLxGENE Census, in the training layout.

X goes through memory a block of source rows at a time. Blocks begin at multiples of their size, so
that a tile of 2,048 rows, as the Census has them, is unpacked once; obs is held whole, as it is
when a file is ingested. The result is a store like one that ``cellray ingest`` wrote.

Legend: N cells that are kept, V genes of the measurement.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import tiledbsoma
from scipy import sparse

from cellray.core.errors import ConfigError, DataError
from cellray.core.memory import keep_freed_memory
from cellray.data import schema
from cellray.data.digest import cell_hashes, content_digest, hash64
from cellray.data.existing import library_figures
from cellray.data.h5ad import check_counts
from cellray.data.locate import local_path, local_target
from cellray.data.sketch import Sketch, SketchBuilder, quantile, sketch_counts
from cellray.data.soma import Store, open_store
from cellray.data.staging import staging
from cellray.data.vocab import strip_version
from cellray.data.writer import (
    create_groups,
    create_x,
    measurement_path,
    write_block,
    write_histogram,
    write_table,
    x_path,
)

__all__ = ["SOURCE_JOINID", "RelayoutReport", "relayout"]

I64 = npt.NDArray[np.int64]

SOURCE_JOINID = "source_joinid"
TILE_ROWS = 2048  # of the Census
_REPORT_S = 5.0
_VAR_OWN = ("feature_id", "feature_name", schema.NUM_NONZERO, schema.NONZERO_MEDIAN)


@dataclass(frozen=True)
class RelayoutReport:
    """What was rewritten.

    Attributes:
        source: the store that was read.
        target: the store that was written.
        cells: N.
        genes: V.
        nonzeros: counts written.
        bytes_before: size of the source, None for an object store.
        bytes_after: size of the target.
        seconds: how long it took.
    """

    source: str
    target: str
    cells: int
    genes: int
    nonzeros: int
    bytes_before: int | None
    bytes_after: int
    seconds: float

    def lines(self) -> list[str]:
        """The report in words."""
        before = "" if self.bytes_before is None else f" (before: {self.bytes_before / 1e6:.1f} MB)"
        return [
            f"{self.target}: {self.cells:,} cells x {self.genes:,} genes, "
            f"{self.nonzeros:,} counts, {self.bytes_after / 1e6:.1f} MB{before}, "
            f"in {self.seconds:.1f} s"
        ]


@dataclass
class _Written:
    """What the reading of X gathers on its way, block by block."""

    nonzero: list[I64]
    sums: list[npt.NDArray[np.float64]]
    hashes: list[npt.NDArray[np.uint64]]
    gene_cells: I64
    sketch: SketchBuilder = field(default_factory=SketchBuilder)


def relayout(
    source: str,
    target: str,
    *,
    measurement: str = schema.MEASUREMENT,
    layer: str = schema.LAYER,
    obs_filter: str = "",
    cells_per_block: int = 2 * TILE_ROWS,
    timestamp: str = "",
    tiledb: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> RelayoutReport:
    """Write the cells of a SOMA experiment anew, in the layout that training reads fastest.

    Cells keep their order and get joinids 0 .. N-1; the old one is obs ``source_joinid``. All other
    columns of obs and var are kept. ``nnz``, ``raw_sum`` and ``cell_hash`` are computed from the
    counts; a column of that name that says something else is kept as ``<name>_source``.
    ``obs_id``, ``dataset_id`` and ``n_measured_vars`` are added where missing. The target appears
    whole or not at all.

    Args:
        source: a local folder, an object-store URI or ``census:...``.
        target: a local folder that does not exist.
        measurement: the measurement that is kept; it must be ``RNA`` in a store that is to be
            appended to.
        layer: its X layer with raw counts; it is ``raw`` in the new store.
        obs_filter: cells to keep, in SOMA's filter language; "" keeps all.
        cells_per_block: source rows in memory at a time, a multiple of 2,048.
        timestamp: the moment whose cells are read, see :func:`cellray.data.soma.open_store`.
        tiledb: TileDB settings for the source.
        progress: takes a line every few seconds: cells, cells/s, time left.

    Raises:
        ConfigError: a block size that is not a multiple of 2,048; a setting or timestamp that is
            not allowed.
        DataError: no such source, measurement or layer; a target that exists or is no local
            folder; a filter that is not understood or keeps no cell; cell ids that are not unique.
    """
    if cells_per_block <= 0 or cells_per_block % TILE_ROWS:
        raise ConfigError(
            f"cells_per_block = {cells_per_block}; it must be a multiple of {TILE_ROWS}, the rows "
            "of a Census tile"
        )
    started = time.monotonic()
    store = open_store(
        source, measurement=measurement, layer=layer, timestamp=timestamp, tiledb=tiledb
    )
    place_of = _free_target(target)
    obs = store.obs(None, value_filter=obs_filter or None)
    if obs.empty:
        kept = f'obs filter "{obs_filter}" keeps no cell' if obs_filter else "there is no cell"
        raise DataError(f"{kept} of '{source}'; nothing was written")
    ids = _cell_ids(obs, source)
    with staging(place_of) as place:
        found = _write_x(store, place, obs, cells_per_block, progress)
        content = content_digest(ids, np.concatenate(found.hashes))
        table = _obs_table(obs, ids, found, store)
        write_table(place / "obs", table)
        sketch = found.sketch.result()
        var = _var_table(store, found, sketch)
        write_table(measurement_path(place, measurement) / "var", var)
        write_histogram(place, measurement, [sketch], store.num_genes)
        ledger = _ledger(store, table, ids, found, content, filtered=bool(obs_filter))
        figures = {schema.META_LIBRARY: library_figures(table, [measurement])}
        create_groups(place, ledger, measurements=[measurement], metadata=figures)
    return RelayoutReport(
        source=store.uri,
        target=str(place_of),
        cells=len(obs),
        genes=store.num_genes,
        nonzeros=int(found.gene_cells.sum()),
        bytes_before=_size(store.uri),
        bytes_after=_size(str(place_of)) or 0,
        seconds=time.monotonic() - started,
    )


def _free_target(target: str) -> Path:
    path = local_target(target)
    if path is None:
        raise DataError(f"the target '{target}' is not a local folder; write it there and copy it")
    if path.exists():
        raise DataError(f"'{path}' exists; choose another target or remove it")
    return path


def _size(uri: str) -> int | None:
    path = local_path(uri)
    if path is None:
        return None
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def _cell_ids(obs: pd.DataFrame, source: str) -> list[str]:
    column = next((c for c in schema.CELL_IDS if c in obs), schema.JOINID)
    ids = obs[column].astype(str)
    if ids.duplicated().any():
        twice = ids[ids.duplicated()].iloc[0]
        raise DataError(
            f"obs '{column}' of '{source}' is not unique: '{twice}' comes more than once; keep one "
            "of the cells with an obs filter"
        )
    return list(ids)


def _spans(joinids: I64, size: int) -> Iterator[slice]:
    """The parts of ascending joinids that lie between multiples of ``size``."""
    edges = np.flatnonzero(np.diff(joinids // size)) + 1
    bounds = [0, *edges.tolist(), len(joinids)]
    for first, last in pairwise(bounds):
        yield slice(first, last)


def _write_x(
    store: Store, place: Path, obs: pd.DataFrame, size: int, progress: Callable[[str], None]
) -> _Written:
    joinids = obs[schema.JOINID].to_numpy(dtype=np.int64)
    num_genes = store.num_genes
    every_gene = np.arange(num_genes, dtype=np.int32)
    hashes = hash64([strip_version(g) for g in store.var()["feature_id"]])
    found = _Written([], [], [], np.zeros(num_genes, dtype=np.int64))
    keep_freed_memory()
    path = x_path(place, store.measurement)
    create_x(path, (len(joinids), num_genes))
    started = said = time.monotonic()
    spans = list(_spans(joinids, size))
    # the next block is read while this one is written
    with tiledbsoma.open(str(path), "w") as x, ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(store.read_block, joinids[spans[0]], every_gene)
        for i, span in enumerate(spans):
            block = ahead.result()
            if i + 1 < len(spans):
                ahead = reader.submit(store.read_block, joinids[spans[i + 1]], every_gene)
            indptr, genes, counts = block.indptr, block.genes, block.counts
            check_counts(
                counts,
                where=f"'{store.uri}' layer {store.layer}, cells {span.start}-{span.stop - 1},",
                advice=" Name the layer that has them (--layer)",
            )
            matrix = sparse.csr_matrix((counts, genes, indptr), shape=(len(block), num_genes))
            write_block(x, matrix, span.start, num_genes)
            total = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
            found.nonzero.append(np.diff(indptr).astype(np.int64))
            found.sums.append(np.diff(total[indptr]))
            found.sketch.add(sketch_counts(indptr, genes, counts, found.sums[-1]))
            found.hashes.append(cell_hashes(indptr, genes, counts, hashes))
            found.gene_cells += np.bincount(genes, minlength=num_genes)
            now = time.monotonic()
            if now - said >= _REPORT_S or span.stop == len(joinids):
                progress(_progress(span.stop, len(joinids), now - started))
                said = now
    return found


def _progress(done: int, total: int, seconds: float) -> str:
    rate = done / max(seconds, 1e-9)
    left = (total - done) / rate
    return f"{done:,} of {total:,} cells, {rate:,.0f} cells/s, {left:,.0f} s left"


def _free_name(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_source"
    return name


def _as_arrow(column: pd.Series) -> pa.ChunkedArray:
    return schema.obs_to_arrow(column.to_frame()).column(0)


def _obs_table(obs: pd.DataFrame, ids: list[str], found: _Written, store: Store) -> pa.Table:
    """Our own columns, the old joinid, then what the source has."""
    name = Path(store.uri.rstrip("/")).name
    own: dict[str, pa.Array] = {
        schema.OBS_ID: pa.array(ids, pa.large_string()),
        schema.DATASET_ID: schema.repeated(name, len(obs)),
        schema.RAW_SUM: pa.array(np.concatenate(found.sums)),
        schema.NUM_NONZERO: pa.array(np.concatenate(found.nonzero)),
        schema.NUM_MEASURED: pa.array(np.full(len(obs), store.num_genes, dtype=np.int64)),
        schema.CELL_HASH: pa.array(np.concatenate(found.hashes)),
        SOURCE_JOINID: pa.array(obs[schema.JOINID].to_numpy(dtype=np.int64)),
    }
    taken = {*own, *map(str, obs.columns)}
    computed = (schema.RAW_SUM, schema.NUM_NONZERO, schema.CELL_HASH)
    rest: dict[str, pa.ChunkedArray] = {}
    for column in obs.columns.drop(schema.JOINID):
        values = _as_arrow(obs[column])
        if column in (schema.OBS_ID, schema.DATASET_ID, schema.NUM_MEASURED):
            own[column] = values
        elif column not in own:
            rest[column] = values
        elif column not in computed or not _same(obs[column], own[column]):
            renamed = _free_name(f"{column}_source", taken)
            taken.add(renamed)
            rest[renamed] = values
    return schema.unify([pa.table({**own, **rest})])


def _same(column: pd.Series, ours: pa.Array) -> bool:
    if column.dtype.kind not in "iuf":
        return False
    return bool(np.array_equal(column.to_numpy(), ours.to_numpy()))


def _var_table(store: Store, found: _Written, sketch: Sketch) -> pa.Table:
    """All columns of var; ids and names where our stores have them, and cells of each gene."""
    read = store._asked("var", lambda e: e.ms[store.measurement].var.read().concat())
    frame = read.to_pandas().sort_values(schema.JOINID, ignore_index=True)
    frame = frame.iloc[: store.num_genes]
    named = store.var()
    columns: dict[str, Any] = {
        "feature_id": pa.array(named["feature_id"].tolist(), pa.large_string()),
        "feature_name": pa.array(named["feature_name"].tolist(), pa.large_string()),
        schema.NUM_NONZERO: pa.array(found.gene_cells),
        schema.NONZERO_MEDIAN: pa.array(quantile(sketch, store.num_genes)),
    }
    for name in frame.columns:
        if name not in (schema.JOINID, *_VAR_OWN):
            columns[name] = _as_arrow(frame[name])
    return pa.table(columns)


def _ledger(
    store: Store,
    obs: pa.Table,
    ids: list[str],
    found: _Written,
    content: str,
    *,
    filtered: bool,
) -> list[dict[str, Any]]:
    """The source's own ledger if all its cells are here, else one entry for the source."""
    if store.ledger and not filtered and len(ids) == store.num_cells:
        return store.ledger
    datasets = obs.column(schema.DATASET_ID).unique().to_pylist()
    return [
        {
            "file": store.uri,
            "dataset_id": str(datasets[0]) if len(datasets) == 1 else Path(store.uri).name,
            "layer": f"{store.measurement}/{store.layer}",
            "cells": len(ids),
            "cells_dropped": store.num_cells - len(ids),
            "genes": store.num_genes,
            "genes_new": store.num_genes,
            "genes_ensembl": int(sum(g.startswith("ENS") for g in store.var()["feature_id"])),
            "genes_merged": {},
            "organism": "",
            "counts": float(sum(s.sum() for s in found.sums)),
            "content_sha256": content,
            "ids_sha256": hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest(),
        }
    ]
