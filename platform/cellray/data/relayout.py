"""Rewriting a SOMA experiment, e.g. one of the CELLxGENE Census, in the training layout.

X goes through memory a block of source rows at a time, in parts that processes can share and an
interrupted relayout takes over. Blocks begin at multiples of their size, so
that a tile of 2,048 rows, as the Census has them, is unpacked once; obs is held whole, as it is
when a file is ingested. The result is a store like one that ``cellray ingest`` wrote.

Legend: N cells that are kept, V genes of the measurement.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from cellray.core.errors import ConfigError, DataError
from cellray.data import parts, schema
from cellray.data.digest import content_digest, hash64
from cellray.data.existing import library_figures
from cellray.data.ingest_tasks import num_workers, run_jobs
from cellray.data.locate import local_path, local_target
from cellray.data.relayout_parts import StorePart, cut
from cellray.data.sketch import UNSEEN, merged_shards, noting_medians
from cellray.data.soma import Store, open_store
from cellray.data.staging import parts_of, staging
from cellray.data.vocab import strip_version
from cellray.data.writer import (
    create_groups,
    create_x,
    measurement_path,
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


@dataclass(frozen=True, eq=False)
class _Written:
    """What was measured of the N cells and V genes on the way."""

    nonzero: I64
    sums: npt.NDArray[np.float64]
    hashes: npt.NDArray[np.uint64]
    gene_cells: I64
    medians: npt.NDArray[np.float32]


def relayout(
    source: str,
    target: str,
    *,
    measurement: str = schema.MEASUREMENT,
    layer: str = schema.LAYER,
    obs_filter: str = "",
    cells_per_block: int = 2 * TILE_ROWS,
    workers: int = 0,
    timestamp: str = "",
    tiledb: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> RelayoutReport:
    """Write the cells of a SOMA experiment anew, in the layout that training reads fastest.

    Cells keep their order and get joinids 0 .. N-1; the old one is obs ``source_joinid``. All other
    columns of obs and var are kept. ``nnz``, ``raw_sum`` and ``cell_hash`` are computed from the
    counts; a column of that name that says something else is kept as ``<name>_source``.
    ``obs_id``, ``dataset_id`` and ``n_measured_vars`` are added where missing. The target appears
    whole or not at all; the same call goes on after an interruption, with the parts that are done.

    Args:
        source: a local folder, an object-store URI or ``census:...``.
        target: a local folder that does not exist.
        measurement: the measurement that is kept; it must be ``RNA`` in a store that is to be
            appended to.
        layer: its X layer with raw counts; it is ``raw`` in the new store.
        obs_filter: cells to keep, in SOMA's filter language; "" keeps all.
        cells_per_block: source rows in memory at a time, a multiple of 2,048.
        workers: processes that read and write, as Ray tasks. 1: this process alone, without Ray; 0:
            one for each CPU, but none for fewer than 20,000 cells.
        timestamp: the moment whose cells are read, see :func:`cellray.data.soma.open_store`.
        tiledb: TileDB settings for the source.
        progress: takes a line every few seconds: cells, cells/s, time left.

    Raises:
        ConfigError: a block size that is not a multiple of 2,048; fewer than 0 workers; a setting
            or timestamp that is not allowed.
        DataError: no such source, measurement or layer; a target that exists or is no local
            folder; a filter that is not understood or keeps no cell; cell ids that are not unique.
    """
    _check_sizes(cells_per_block, workers)
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
    joinids = obs[schema.JOINID].to_numpy(dtype=np.int64)
    jobs = cut(
        store,
        joinids,
        cells_per_block=cells_per_block,
        gene_hashes=hash64([strip_version(g) for g in store.var()["feature_id"]]),
        stamp=store.fingerprint(joinids),
    )
    with staging(place_of) as place:
        found = _write_x(store, place_of, place, jobs, num_workers(workers, len(obs)), progress)
        content = content_digest(ids, found.hashes)
        table = _obs_table(obs, ids, found, store)
        write_table(place / "obs", table)
        var = _var_table(store, found)
        write_table(measurement_path(place, measurement) / "var", var)
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


def _check_sizes(cells_per_block: int, workers: int) -> None:
    if cells_per_block <= 0 or cells_per_block % TILE_ROWS:
        raise ConfigError(
            f"cells_per_block = {cells_per_block}; it must be a multiple of {TILE_ROWS}, the rows "
            "of a Census tile"
        )
    if workers < 0:
        raise ConfigError(f"workers = {workers}; it must be 0 (one a CPU) or more")


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


def _write_x(
    store: Store,
    target: Path,
    place: Path,
    jobs: Sequence[StorePart],
    workers: int,
    progress: Callable[[str], None],
) -> _Written:
    """Do the parts that are not done, and put X and the histogram together."""
    folder = parts_of(target)
    parts.prepare(folder)
    parts.discard_others(folder, {job.key for job in jobs})
    _run(jobs, folder, workers, progress)
    x, num_genes = x_path(place, store.measurement), store.num_genes
    create_x(x, (sum(job.num_cells for job in jobs), num_genes))
    gene_cells, sketches = np.zeros(num_genes, dtype=np.int64), []
    for job in jobs:
        parts.adopt(folder, job, x)
        cells, sketch = parts.sketch_of(folder, job)
        gene_cells += cells
        sketches.append(sketch)
    medians = np.full(num_genes, UNSEEN, dtype=np.float32)
    shards = noting_medians(merged_shards(sketches), medians)
    write_histogram(place, store.measurement, shards, num_genes)
    found = [parts.figures(folder, job) for job in jobs]
    joined = {n: np.concatenate([f[n] for f in found]) for n in ("nonzero", "sums", "hashes")}
    return _Written(**joined, gene_cells=gene_cells, medians=medians)


def _run(
    jobs: Sequence[StorePart], folder: Path, workers: int, progress: Callable[[str], None]
) -> None:
    waiting = [job for job in jobs if not (folder / job.key).exists()]
    total = sum(job.num_cells for job in jobs)
    done = taken_over = total - sum(job.num_cells for job in waiting)
    if taken_over:
        progress(f"{taken_over:,} of {total:,} cells taken over from one that was interrupted")
    started = said = time.monotonic()

    def tick(_: StorePart, count: int) -> None:
        nonlocal done, said
        done += count
        now = time.monotonic()
        if now - said >= _REPORT_S or done == total:
            rate = (done - taken_over) / max(now - started, 1e-9)
            progress(_progress(done, total, rate))
            said = now

    run_jobs(waiting, folder, workers=workers, tick=tick)


def _progress(done: int, total: int, rate: float) -> str:
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
        schema.RAW_SUM: pa.array(found.sums),
        schema.NUM_NONZERO: pa.array(found.nonzero),
        schema.NUM_MEASURED: pa.array(np.full(len(obs), store.num_genes, dtype=np.int64)),
        schema.CELL_HASH: pa.array(found.hashes),
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


def _var_table(store: Store, found: _Written) -> pa.Table:
    """All columns of var; ids and names where our stores have them, and cells of each gene."""
    read = store._asked("var", lambda e: e.ms[store.measurement].var.read().concat())
    frame = read.to_pandas().sort_values(schema.JOINID, ignore_index=True)
    frame = frame.iloc[: store.num_genes]
    named = store.var()
    columns: dict[str, Any] = {
        "feature_id": pa.array(named["feature_id"].tolist(), pa.large_string()),
        "feature_name": pa.array(named["feature_name"].tolist(), pa.large_string()),
        schema.NUM_NONZERO: pa.array(found.gene_cells),
        schema.NONZERO_MEDIAN: pa.array(found.medians),
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
            "counts": float(found.sums.sum()),
            "content_sha256": content,
            "ids_sha256": hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest(),
        }
    ]
