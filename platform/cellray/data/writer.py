"""Writing the arrays of a SOMA experiment in the training layout: obs, var, X and their groups.

Legend: N cells of a block, V genes of a measurement.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tiledbsoma
from scipy import sparse

from cellray.data import schema, snapshot
from cellray.data.sketch import NUM_BUCKETS, Sketch
from cellray.data.staging import link_tree
from cellray.data.storage import open_soma

__all__ = [
    "create_groups",
    "create_x",
    "measurement_path",
    "prepare_x",
    "write_block",
    "write_histogram",
    "write_rows",
    "write_table",
    "x_path",
]

_ENTRIES_AT_ONCE = 500_000
_ROWS_AT_ONCE = 262_144  # of obs: bounds what TileDB holds to sort and compress it


def measurement_path(place: Path, measurement: str = schema.MEASUREMENT) -> Path:
    """Where a measurement of the store at ``place`` is."""
    return place / "ms" / measurement


def x_path(place: Path, measurement: str = schema.MEASUREMENT, layer: str = schema.LAYER) -> Path:
    """Where an X layer of the store at ``place`` is."""
    return measurement_path(place, measurement) / "X" / layer


def create_groups(
    place: Path,
    ledger: Sequence[dict[str, Any]],
    *,
    measurements: Sequence[str] = (schema.MEASUREMENT,),
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Tie obs and the measurements' var and X at ``place`` together into an experiment.

    Args:
        place: a folder that holds ``obs`` and, for each measurement, ``var`` and ``X/raw``.
        ledger: one JSON-like entry for each file that is in the store; those without a time get
            the present one and what the store holds now, see :mod:`cellray.data.snapshot`.
        measurements: names of the measurements.
        metadata: further metadata of the experiment.
    """
    with tiledbsoma.Experiment.create(str(place)) as experiment:
        experiment.metadata[schema.META_FORMAT] = schema.FORMAT_VERSION
        for key, value in (metadata or {}).items():
            experiment.metadata[key] = value
        collection = experiment.add_new_collection("ms")
        members = [(experiment, "obs", place / "obs")]
        for name in measurements:
            group = collection.add_new_collection(name, tiledbsoma.Measurement)
            members.append((group, "var", measurement_path(place, name) / "var"))
            layers = group.add_new_collection("X")
            members.append((layers, schema.LAYER, x_path(place, name)))
            histogram = measurement_path(place, name) / "varm" / schema.HISTOGRAM
            if histogram.exists():
                varm = group.add_new_collection("varm")
                members.append((varm, schema.HISTOGRAM, histogram))
        for parent, name, path in members:
            with open_soma(str(path)) as member:
                parent.set(name, member, use_relative_uri=True)
        with open_soma(str(place / "obs")) as obs:
            cells = int(obs.count)
        genes = {}
        for name in measurements:
            with open_soma(str(measurement_path(place, name) / "var")) as var:
                genes[name] = int(var.count)
        stamped = snapshot.stamp(ledger, cells=cells, genes=genes)
        experiment.metadata[schema.META_LEDGER] = json.dumps(stamped)


def write_table(path: Path, table: pa.Table) -> None:
    """Write obs or var whole, with joinids 0 .. n-1."""
    joinids = pa.array(np.arange(len(table), dtype=np.int64))
    table = table.add_column(0, schema.JOINID, joinids)
    # Created in the past and opened again: TileDB keeps labels of dictionary columns in a later
    # version of the schema, and finds it by its time, which must differ from that of the first.
    tiledbsoma.DataFrame.create(
        str(path),
        schema=table.schema,
        index_column_names=[schema.JOINID],
        domain=[(0, max(0, len(table) - 1))],
        platform_config=schema.table_options(),
        tiledb_timestamp=1,
    ).close()
    with tiledbsoma.open(str(path), "w") as frame:
        for first in range(0, max(1, len(table)), _ROWS_AT_ONCE):
            frame.write(table.slice(first, _ROWS_AT_ONCE))


def create_x(path: Path, shape: tuple[int, int]) -> None:
    """Create an empty X layer of ``shape`` (cells, V) at ``path``; parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tiledbsoma.SparseNDArray.create(
        str(path), type=pa.float32(), shape=shape, platform_config=schema.x_options()
    ).close()


def prepare_x(
    target: Path, place: Path, shape: tuple[int, int], *, measurement: str, append: bool
) -> Path:
    """X of the new store at ``place``: a fresh one, or one that shares the old fragments.

    Returns:
        Where it is.
    """
    path = x_path(place, measurement)
    if append:
        path.parent.mkdir(parents=True)
        link_tree(x_path(target, measurement), path)
        with tiledbsoma.open(str(path), "w") as x:
            x.resize(shape)
    else:
        create_x(path, shape)
    return path


def write_histogram(
    place: Path, measurement: str, shards: Iterable[Sketch], num_genes: int
) -> None:
    """Write the sketch of a measurement's genes: (V, buckets) int64, how often each was hit.

    Args:
        place: the store.
        measurement: whose genes.
        shards: the sketch over all its cells, in pieces.
        num_genes: V.
    """
    path = measurement_path(place, measurement) / "varm" / schema.HISTOGRAM
    path.parent.mkdir(parents=True)
    shape = (num_genes, NUM_BUCKETS)
    tiledbsoma.SparseNDArray.create(
        str(path), type=pa.int64(), shape=shape, platform_config=schema.histogram_options()
    ).close()
    with tiledbsoma.open(str(path), "w") as array:
        for part in _of_size(shards, _ENTRIES_AT_ONCE):
            table = {
                "soma_dim_0": part.genes,
                "soma_dim_1": part.buckets,
                "soma_data": part.counts.astype(np.int64),
            }
            array.write(pa.table(table))


def _of_size(shards: Iterable[Sketch], most: int) -> Iterator[Sketch]:
    """Pieces of a sketch put together or divided: ``most`` entries each, the last one fewer."""
    keys, counts = np.zeros(0, np.uint32), np.zeros(0, np.uint32)
    for shard in shards:
        keys, counts = np.append(keys, shard.keys), np.append(counts, shard.counts)
        while len(keys) >= most:
            yield Sketch(keys[:most], counts[:most])
            keys, counts = keys[most:], counts[most:]
    if len(keys):
        yield Sketch(keys, counts)


def write_block(x: Any, block: sparse.csr_matrix, first: int, num_genes: int) -> None:
    """Write N cells as one fragment.

    Args:
        x: an X layer, open for writing.
        block: (N, V) counts, genes ascending within a cell, no zeros.
        first: joinid of the block's first cell.
        num_genes: V of the store.
    """
    assert block.shape[1] <= num_genes, f"{block.shape[1]} genes for a store of {num_genes}"
    write_rows(x, block, np.arange(first, first + block.shape[0], dtype=np.int64))


def write_rows(x: Any, block: sparse.csr_matrix, joinids: npt.NDArray[np.int64]) -> None:
    """Write N cells as one fragment.

    Args:
        x: an X layer, open for writing.
        block: (N, V) counts, genes ascending within a cell, no zeros.
        joinids: (N,) ascending.
    """
    if block.nnz == 0:
        return
    table = pa.table(
        {
            "soma_dim_0": np.repeat(joinids, np.diff(block.indptr)),
            "soma_dim_1": block.indices.astype(np.int64),
            "soma_data": block.data,
        }
    )
    # compressed rows are in TileDB's own order as long as one tile spans all genes
    ordered = tiledbsoma.TileDBWriteOptions(sort_coords=block.shape[1] > schema.GENE_TILE)
    x.write(table, platform_config=ordered)
