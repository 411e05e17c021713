"""What else was measured in the cells of a file: found, looked at and joined by cell id.

Legend: N cells of the main file, M cells of the other one, F features.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from cellray.core.errors import ConfigError, DataError, did_you_mean
from cellray.data import schema
from cellray.data.digest import hash64
from cellray.data.genes import GeneMapping
from cellray.data.h5ad import MODALITY, OBSM, H5adFile, file_of
from cellray.data.ingest_config import IngestConfig, MeasurementConfig
from cellray.data.sources import Source, digest_of_ids, unique_ids

__all__ = ["check_measurements", "join_cells", "look_measurement", "origin"]

I64 = npt.NDArray[np.int64]

_NAMES = ("feature_name", "gene_symbols", "gene_names", "name")
_TYPES = "feature_types"


def check_measurements(config: IngestConfig, num_files: int) -> None:
    """Refuse lists of files that do not fit ``ingest.files``.

    Raises:
        ConfigError: a measurement names another number of files.
    """
    for name, measurement in config.measurements.items():
        given = len(measurement.files)
        if given not in (0, num_files):
            raise ConfigError(
                f"ingest.measurements.{name}.files names {given} files for {num_files} files of "
                'ingest.files; give one for each, "" where there is none'
            )


def origin(measurement: MeasurementConfig, source: Source) -> str:
    """Where the measurement of a file was, in words."""
    if measurement.obsm:
        return f"obsm['{measurement.obsm}']"
    if measurement.feature_types:
        return f"feature_types '{measurement.feature_types}'"
    return source.path


def look_measurement(config: IngestConfig, name: str, main: Source, number: int) -> Source | None:
    """Look at a measurement of the cells of file ``number`` (from 0).

    Returns:
        None where ``files`` has "" for that file.

    Raises:
        DataError: it cannot be used; the message says why.
    """
    measurement = config.measurements[name]
    path = measurement.files[number] if measurement.files else main.path
    if measurement.modality:
        path = f"{file_of(main.path)}{MODALITY}{measurement.modality}"
    if not path:
        return None
    with H5adFile(path) as file:
        return _look(config, name, measurement, main, path, file)


def _look(
    config: IngestConfig,
    name: str,
    measurement: MeasurementConfig,
    main: Source,
    path: str,
    file: H5adFile,
) -> Source:
    apart = bool(measurement.files or measurement.modality)  # has cells of its own
    if measurement.obsm:
        layer = file.choose_layer(OBSM + measurement.obsm)
        ids = names = file.obsm_names(measurement.obsm)
        taken = np.ones(len(ids), dtype=bool)
    else:
        layer = file.choose_layer(measurement.layer if apart else main.layer)
        var = file.var(layer)
        taken = _taken(path, name, measurement, var)
        ids, names = _features(var[taken])
    if file.shape(layer) != (file.num_cells, len(taken)):
        shape = file.shape(layer)
        raise DataError(
            f"'{path}': {name} in {layer} is {shape[0]} x {shape[1]}, but there are "
            f"{file.num_cells} cells and {len(taken)} features"
        )
    twice = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        raise DataError(
            f"'{path}': features of {name} occur more than once: "
            f"{', '.join(map(repr, twice[:5]))}; make them unique"
        )
    cell_ids = main.cell_ids
    if apart:
        obs = schema.obs_to_arrow(file.obs()) if config.cell_id_column else pa.table({})
        cell_ids = unique_ids(config, path, file, obs)
    status = file_of(path).stat()
    return Source(
        path=path,
        dataset_id=main.dataset_id,
        named=main.named,
        layer=layer,
        obs=pa.table({}),
        cell_ids=cell_ids,
        id_hashes=hash64(cell_ids) if apart else main.id_hashes,
        ids_sha256=digest_of_ids(cell_ids) if apart else main.ids_sha256,
        taken=taken,
        genes=GeneMapping(tuple(ids), tuple(names), {}, 0, ""),
        stamp=(status.st_size, status.st_mtime_ns),
        by_columns=file.by_columns(layer),
    )


def _taken(
    path: str, name: str, measurement: MeasurementConfig, var: pd.DataFrame
) -> npt.NDArray[np.bool_]:
    if not measurement.feature_types:
        return np.ones(len(var), dtype=bool)
    if _TYPES not in var:
        raise DataError(
            f"'{path}': measurement {name} is to be split by feature_types, but var has no such "
            f"column. It has: {', '.join(map(str, var.columns)) or 'no columns'}"
        )
    found = var[_TYPES].astype(str)
    taken = np.asarray(found == measurement.feature_types)
    if not taken.any():
        allowed = sorted(found.unique())
        raise DataError(
            f"'{path}': no feature is of feature_types '{measurement.feature_types}'."
            f"{did_you_mean(measurement.feature_types, allowed)} There are: {', '.join(allowed)}"
        )
    return taken


def _features(var: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Ids as the file has them, and names where it has any."""
    ids = [str(i).strip() for i in var.index]
    column = next((c for c in _NAMES if c in var.columns), None)
    if column is None:
        return ids, ids
    missing = var[column].isna().to_numpy()
    values = var[column].astype(object)
    return ids, [i if m else str(n) for i, n, m in zip(ids, values, missing, strict=True)]


def join_cells(main: Source, joinids: I64, other: Source) -> I64:
    """Where each cell of the other measurement goes.

    Args:
        main: the N cells.
        joinids: (N,) where they go, -1 for those left out.
        other: the M cells.

    Returns:
        (M,) joinids, -1 for cells that are not among those written.

    Raises:
        DataError: no cell has an id of the main file: the files are of different cells, or write
            their ids in different ways.
    """
    order = np.argsort(main.id_hashes, kind="stable")
    ascending = main.id_hashes[order]
    place = np.minimum(np.searchsorted(ascending, other.id_hashes), len(ascending) - 1)
    met = ascending[place] == other.id_hashes
    if not met.any():
        raise DataError(
            f"no cell of '{other.path}' is among the cells of '{main.path}': ids are like "
            f"{other.cell_ids[0].as_py()!r} there and {main.cell_ids[0].as_py()!r} here"
        )
    result: I64 = np.where(met, joinids[order[place]], -1)
    return result
