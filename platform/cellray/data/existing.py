"""The store that an ingest adds to, and the figures of all its cells that it keeps.

Legend: V features of a measurement, Q quantiles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cellray.core.errors import DataError
from cellray.data import schema
from cellray.data.ingest_config import IngestConfig
from cellray.data.joining import Existing, OldVar
from cellray.data.opening import open_experiment
from cellray.data.sketch import Sketch, SketchBuilder, sketch_counts
from cellray.data.soma import open_store

__all__ = [
    "QUANTILES",
    "library_figures",
    "read_existing",
    "stored_library_sizes",
    "stored_medians",
    "stored_sketch",
]

F32 = npt.NDArray[np.float32]

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_CELLS_AT_ONCE = 4096


def _open(uri: str, measurement: str, tiledb: Mapping[str, str] | None) -> Any:
    """The experiment, once it is known to be one and to have the measurement."""
    store = open_store(uri, measurement=measurement, tiledb=tiledb)
    return open_experiment(store.uri, store.tiledb)


def _sketch(experiment: Any, measurement: str) -> Sketch | None:
    group = experiment.ms[measurement]
    if "varm" not in group or schema.HISTOGRAM not in group.varm:
        return None
    parts = [
        Sketch.of(t.column(0).to_numpy(), t.column(1).to_numpy(), t.column(2).to_numpy())
        for t in group.varm[schema.HISTOGRAM].read().tables()
    ]
    builder = SketchBuilder()
    for part in parts:
        builder.add(part)
    return builder.result()


def stored_sketch(
    uri: str, *, measurement: str = schema.MEASUREMENT, tiledb: Mapping[str, str] | None = None
) -> Sketch | None:
    """The sketch of normalised counts over all cells of a store.

    Args:
        uri: the store.
        measurement: its measurement.
        tiledb: TileDB settings, as :func:`open_store` takes them.

    Returns:
        None where the store has none (Census, stores of older versions).

    Raises:
        DataError: there is no such store, or it lacks the measurement.
    """
    with _open(uri, measurement, tiledb) as experiment:
        return _sketch(experiment, measurement)


def stored_medians(
    uri: str, *, measurement: str = schema.MEASUREMENT, tiledb: Mapping[str, str] | None = None
) -> F32 | None:
    """The non-zero median of each gene's normalised counts over all cells of a store.

    Read from var; within 0.4 % of the exact figure, see :mod:`cellray.data.sketch`.

    Args:
        uri: the store.
        measurement: its measurement.
        tiledb: TileDB settings, as :func:`open_store` takes them.

    Returns:
        (V,) in the order of var, 1.0 for genes that no cell expresses; None where the store has
        none (Census, stores of older versions).

    Raises:
        DataError: there is no such store, or it lacks the measurement.
    """
    with _open(uri, measurement, tiledb) as experiment:
        var = experiment.ms[measurement].var
        if schema.NONZERO_MEDIAN not in var.schema.names:
            return None
        columns = [schema.JOINID, schema.NONZERO_MEDIAN]
        table = var.read(column_names=columns).concat().sort_by(schema.JOINID)
    found: F32 = table.column(schema.NONZERO_MEDIAN).to_numpy().astype(np.float32)
    return found


def stored_library_sizes(
    uri: str, *, measurement: str = schema.MEASUREMENT, tiledb: Mapping[str, str] | None = None
) -> dict[float, float] | None:
    """Quantiles of the library sizes of all cells of a store, from its metadata.

    Args:
        uri: the store.
        measurement: its measurement.
        tiledb: TileDB settings, as :func:`open_store` takes them.

    Returns:
        Quantile (0..1) -> total counts of a cell; None where the store has none.

    Raises:
        DataError: there is no such store, or it lacks the measurement.
    """
    with _open(uri, measurement, tiledb) as experiment:
        found = json.loads(experiment.metadata.get(schema.META_LIBRARY, "{}"))
    figures = found.get(measurement)
    return None if figures is None else {float(q): v for q, v in figures["quantiles"].items()}


def library_figures(obs: pa.Table, measurements: Sequence[str]) -> str:
    """The metadata that :func:`stored_library_sizes` reads, JSON.

    Args:
        obs: all cells.
        measurements: names; cells without a measurement do not count for it.
    """
    result: dict[str, Mapping[str, Any]] = {}
    for name in measurements:
        sizes = obs.column(schema.raw_sum(name)).drop_null().to_numpy()
        if name != schema.MEASUREMENT:
            sizes = sizes[sizes > 0]
        if len(sizes):
            values = np.quantile(sizes, QUANTILES).tolist()
            quantiles = {str(q): v for q, v in zip(QUANTILES, values, strict=True)}
            result[name] = {"cells": len(sizes), "quantiles": quantiles}
    return json.dumps(result)


def _computed(target: Path, measurement: str) -> Sketch:
    """The sketch of a store that was written without one; reads its X."""
    store = open_store(str(target), measurement=measurement)
    builder = SketchBuilder()
    every_gene = np.arange(store.num_genes, dtype=np.int32)
    for first in range(0, store.shape[0], _CELLS_AT_ONCE):
        joinids = np.arange(first, min(first + _CELLS_AT_ONCE, store.shape[0]), dtype=np.int64)
        block = store.read_block(joinids, every_gene)
        builder.add(sketch_counts(block.indptr, block.genes, block.counts, block.library_sizes))
    return builder.result()


def _old_var(target: Path, experiment: Any, name: str) -> OldVar:
    var = experiment.ms[name].var.read().concat().to_pandas().sort_values(schema.JOINID)
    sketch = _sketch(experiment, name)
    return OldVar(
        ids=var["feature_id"].tolist(),
        names=var["feature_name"].tolist(),
        num_cells=var[schema.NUM_NONZERO].to_numpy(dtype=np.int64),
        sketch=_computed(target, name) if sketch is None else sketch,
    )


def read_existing(config: IngestConfig, target: Path) -> Existing:
    """What is at ``target`` already.

    Raises:
        DataError: something is there that is no store of ours, or ``append`` is false.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return Existing()
    store = open_store(str(target))
    with open_experiment(str(target)) as experiment:
        if schema.META_FORMAT not in experiment.metadata:
            raise DataError(
                f"'{target}' is a SOMA experiment that cellray did not write; ingest into "
                "another uri"
            )
        if not config.append:
            raise DataError(
                f"there is a store at '{target}' and ingest.append = false; choose another uri "
                "or remove it"
            )
        var = {name: _old_var(target, experiment, name) for name in experiment.ms}
        obs = experiment.obs.read().concat()
    joinids = obs.column(schema.JOINID).to_numpy()
    if not bool((np.diff(joinids) > 0).all()):
        obs = obs.take(pa.array(np.argsort(joinids, kind="stable")))
    return Existing(
        var=var,
        obs=obs.drop_columns([schema.JOINID]),
        ledger=store.ledger,
    )
