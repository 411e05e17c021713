"""A synthetic single-cell atlas with known biology, of any size, written straight to a store.

What a cell is and what it counts is a function of the configuration and of the cell's index alone
(see :mod:`cellray.data.synthetic_biology` for the model), so blocks are made in any order by any
number of workers. Memory is bounded by a block a worker and 24 bytes a cell here.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import tiledbsoma

from cellray.core.errors import ConfigError, DataError
from cellray.data import schema
from cellray.data.digest import cell_hashes, content_digest, hash64
from cellray.data.locate import local_target
from cellray.data.staging import staging
from cellray.data.storage import open_soma
from cellray.data.synthetic_biology import Biology, biology
from cellray.data.synthetic_blocks import BlockJob, write_blocks
from cellray.data.synthetic_cells import (
    cell_facts,
    draw_counts,
    find_library_size,
    labels,
    obs_frame,
)
from cellray.data.synthetic_config import SynthesizeConfig
from cellray.data.synthetic_truth import META_SYNTHETIC, Truth, load_truth, truth_of, write_truth
from cellray.data.writer import create_groups, create_x, measurement_path, write_table, x_path

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "SynthesizeConfig",
    "SynthesizeReport",
    "Truth",
    "load_truth",
    "refuse_existing",
    "synthesize",
    "synthesize_anndata",
]

Progress = Callable[[str], None]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

_PROGRESS_EVERY_S = 2.0
_OBS_ROWS = 65_536


@dataclass(frozen=True)
class SynthesizeReport:
    """What was made.

    Attributes:
        uri: the store.
        num_cells: cells in it.
        num_genes: genes in it.
        genes_per_cell: mean of detected genes.
        counts_per_cell: mean of counts.
        library_size: median library size that was used.
        seconds: wall time.
        cells_per_s: cells made and written a second, all else included.
    """

    uri: str
    num_cells: int
    num_genes: int
    genes_per_cell: float
    counts_per_cell: float
    library_size: float
    seconds: float
    cells_per_s: float


class _Tally:
    """What is known of all cells, as blocks come in, and how far the work is."""

    def __init__(self, config: SynthesizeConfig, progress: Progress) -> None:
        self.sums = np.zeros(config.num_cells)
        self.nonzero: I64 = np.zeros(config.num_cells, dtype=np.int64)
        self.hashes: U64 = np.zeros(config.num_cells, dtype=np.uint64)
        self.gene_cells: I64 = np.zeros(config.num_genes, dtype=np.int64)
        self._progress, self._done = progress, 0
        self._started = self._said = time.monotonic()

    def add(self, block: Any) -> None:
        """Note a block that was written."""
        rows = slice(block.first, block.first + len(block.sums))
        self.sums[rows], self.nonzero[rows] = block.sums, block.nonzero
        self.hashes[rows] = block.hashes
        self.gene_cells += block.gene_cells
        self._done += len(block.sums)
        now = time.monotonic()
        if self._done == len(self.sums) or now - self._said >= _PROGRESS_EVERY_S:
            self._said = now
            rate = self._done / max(now - self._started, 1e-9)
            left = (len(self.sums) - self._done) / rate
            self._progress(
                f"{self._done:,} of {len(self.sums):,} cells, {rate:,.0f} cells/s, "
                f"ETA {left:,.0f} s"
            )


def _cell_ids(first: int, last: int) -> npt.NDArray[np.str_]:
    return np.char.mod("cell_%010d", np.arange(first, last))


def _obs_parts(atlas: Biology) -> Iterator[tuple[int, pd.DataFrame]]:
    total = atlas.config.num_cells
    for first in range(0, total, _OBS_ROWS):
        cells = np.arange(first, min(first + _OBS_ROWS, total), dtype=np.int64)
        yield first, obs_frame(atlas, cell_facts(atlas, cells))


def _used_labels(atlas: Biology) -> dict[str, I64]:
    """For each text column of obs, the codes that occur."""
    used: dict[str, I64] = {}
    for _, frame in _obs_parts(atlas):
        for name in frame.columns:
            if isinstance(frame[name].dtype, pd.CategoricalDtype):
                codes = np.unique(frame[name].cat.codes.to_numpy()).astype(np.int64)
                used[name] = np.union1d(used.get(name, codes), codes)
    return used


def _coded(column: pd.Series, used: I64) -> pa.Array:
    rank = np.zeros(len(column.cat.categories), dtype=np.int32)
    rank[used] = np.arange(len(used))
    words = pa.array([str(column.cat.categories[c]) for c in used], pa.large_string())
    return pa.DictionaryArray.from_arrays(pa.array(rank[column.cat.codes]), words)


def _obs_tables(atlas: Biology, tally: _Tally) -> Iterator[pa.Table]:
    """Obs in pieces, in joinid order, without joinid; text columns share their labels."""
    used = _used_labels(atlas)
    measured = atlas.config.num_genes
    for first, frame in _obs_parts(atlas):
        rows = slice(first, first + len(frame))
        columns: dict[str, Any] = {
            schema.OBS_ID: pa.array(_cell_ids(first, rows.stop).tolist(), pa.large_string()),
            schema.DATASET_ID: _coded(frame["batch"], used["batch"]),
            schema.RAW_SUM: tally.sums[rows],
            schema.NUM_NONZERO: tally.nonzero[rows],
            schema.NUM_MEASURED: np.full(len(frame), measured, dtype=np.int64),
            schema.CELL_HASH: tally.hashes[rows],
        }
        for name in frame.columns:
            columns[name] = (
                _coded(frame[name], used[name]) if name in used else frame[name].to_numpy()
            )
        yield pa.table(columns)


def _write_obs(path: Path, tables: Iterator[pa.Table], num_cells: int) -> None:
    """Write obs piece by piece, as :func:`cellray.data.writer.write_table` does whole."""
    first = 0
    for table in tables:
        joinids = pa.array(np.arange(first, first + len(table), dtype=np.int64))
        table = table.add_column(0, schema.JOINID, joinids)
        if first == 0:
            # in the past, for the reason that write_table gives
            tiledbsoma.DataFrame.create(
                str(path),
                schema=table.schema,
                index_column_names=[schema.JOINID],
                domain=[(0, num_cells - 1)],
                platform_config=schema.table_options(),
                tiledb_timestamp=1,
            ).close()
        with tiledbsoma.open(str(path), "w") as frame:
            frame.write(table)
        first += len(table)


def _var(atlas: Biology, gene_cells: I64) -> pa.Table:
    return pa.table(
        {
            "feature_id": pa.array(list(atlas.gene_ids), pa.large_string()),
            "feature_name": pa.array(list(atlas.gene_names), pa.large_string()),
            schema.NUM_NONZERO: gene_cells,
        }
    )


def _ledger(atlas: Biology, tally: _Tally) -> list[dict[str, Any]]:
    """One entry a dataset, as if each had been a file."""
    entries = []
    for number, name in enumerate(labels(atlas).datasets):
        first, last = (int(c) for c in atlas.dataset_starts[number : number + 2])
        ids, rows = _cell_ids(first, last), slice(first, last)
        entries.append(
            {
                "file": f"synthetic:{name}",
                "dataset_id": name,
                "layer": "X",
                "cells": last - first,
                "cells_dropped": 0,
                "genes": atlas.config.num_genes,
                "genes_new": atlas.config.num_genes if number == 0 else 0,
                "genes_ensembl": atlas.config.num_genes,
                "genes_merged": {},
                "organism": "human",
                "counts": float(tally.sums[rows].sum()),
                "content_sha256": content_digest(ids, tally.hashes[rows]),
                "ids_sha256": hashlib.sha256("\n".join(ids.tolist()).encode()).hexdigest(),
            }
        )
    return entries


def refuse_existing(config: SynthesizeConfig) -> Path:
    """Where the store will be, if it may be written there.

    Raises:
        ConfigError: no uri.
        DataError: an object store, or something is at ``uri`` that may not be replaced.
    """
    if not config.uri:
        raise ConfigError("uri is missing: the folder of the store to make, e.g. uri=runs/atlas")
    target = local_target(config.uri)
    if target is None:
        raise DataError(
            f"synthesize writes to a local folder, not to '{config.uri}'; make the atlas locally, "
            "then copy the folder to the object store"
        )
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if not config.overwrite:
        raise DataError(
            f"there is something at '{target}'; choose another uri, remove it, or set "
            "overwrite = true"
        )
    try:
        with open_soma(str(target)) as found:
            ours = META_SYNTHETIC in found.metadata
    except DataError:
        ours = False
    if not ours:
        raise DataError(f"'{target}' is not a synthetic atlas: overwrite replaces nothing else")
    return target


def synthesize(
    config: SynthesizeConfig, *, progress: Progress = lambda _: None
) -> SynthesizeReport:
    """Make an atlas and publish it at ``config.uri``, whole or not at all.

    With ``workers`` other than 1 it uses the Ray that this process is connected to, or starts a
    local one.

    Args:
        config: what it looks like.
        progress: is told how far the work is, a line at a time.

    Raises:
        ConfigError: no uri.
        DataError: something is at the uri already, it cannot be written, or a worker died.
    """
    started = time.monotonic()
    target = refuse_existing(config)
    atlas = biology(config)
    library_size = find_library_size(atlas)
    progress(
        f"atlas: {config.num_cells:,} cells x {config.num_genes:,} genes, median library size "
        f"{library_size:,.0f}"
    )
    tally = _Tally(config, progress)
    with staging(target) as place:
        try:
            create_x(x_path(place), (config.num_cells, config.num_genes))
            job = BlockJob(config, str(place), library_size)
            # closed before the staging folder goes, so that no worker writes into it any more
            with closing(write_blocks(job, workers=config.workers)) as blocks:
                for block in blocks:
                    tally.add(block)
            _write_obs(place / "obs", _obs_tables(atlas, tally), config.num_cells)
            write_table(measurement_path(place) / "var", _var(atlas, tally.gene_cells))
            create_groups(place, _ledger(atlas, tally))
            write_truth(place, truth_of(atlas))
        except (tiledbsoma.SOMAError, OSError) as error:
            raise DataError(f"writing '{target}' failed: {error}") from error
    seconds = time.monotonic() - started
    return SynthesizeReport(
        uri=str(target),
        num_cells=config.num_cells,
        num_genes=config.num_genes,
        genes_per_cell=float(tally.nonzero.mean()),
        counts_per_cell=float(tally.sums.mean()),
        library_size=library_size,
        seconds=seconds,
        cells_per_s=config.num_cells / max(seconds, 1e-9),
    )


def synthesize_anndata(config: SynthesizeConfig) -> AnnData:
    """The same cells as :func:`synthesize` writes, in memory.

    Args:
        config: what the atlas looks like; ``uri`` and ``workers`` play no part.

    Returns:
        X (N, V) float32 raw counts as compressed rows, obs and var as in the store, and
        ``uns["truth"]``: the tables and arrays of :class:`Truth` by name.
    """
    from anndata import AnnData

    atlas = biology(config)
    facts = cell_facts(atlas, np.arange(config.num_cells, dtype=np.int64))
    counts = draw_counts(atlas, facts, find_library_size(atlas))
    obs = obs_frame(atlas, facts)
    own = {
        schema.DATASET_ID: obs["batch"],
        schema.RAW_SUM: np.asarray(counts.sum(axis=1, dtype=np.float64)).reshape(-1),
        schema.NUM_NONZERO: np.diff(counts.indptr).astype(np.int64),
        schema.NUM_MEASURED: np.full(config.num_cells, config.num_genes),
        schema.CELL_HASH: cell_hashes(
            counts.indptr, counts.indices, counts.data, hash64(list(atlas.gene_ids))
        ),
    }
    for position, (name, values) in enumerate(own.items()):
        obs.insert(position, name, values)
    obs.index = pd.Index(_cell_ids(0, config.num_cells).astype(object), name=schema.OBS_ID)
    for name in obs.columns:
        if isinstance(obs[name].dtype, pd.CategoricalDtype):
            obs[name] = obs[name].cat.remove_unused_categories()
    gene_cells = np.bincount(counts.indices, minlength=config.num_genes)
    var = _var(atlas, gene_cells).to_pandas().set_index("feature_id")
    return AnnData(X=counts, obs=obs, var=var, uns={"truth": vars(truth_of(atlas))})
