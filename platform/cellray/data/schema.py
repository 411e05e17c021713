"""The layout of a store on disk: names, tiling and column types, shared by reading and writing.

A store follows the CELLxGENE Census: ``obs``, ``ms/RNA/var`` and ``ms/RNA/X/raw``. Census tiles X
by 2,048 x 2,048; a store that is read in small runs of neighbouring cells wants tiles of few rows
that span all genes, so ours are 64 rows tall: 64 neighbours touch their own data tiles only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from cellray.core.errors import DataError

__all__ = [
    "CELL_HASH",
    "CELL_IDS",
    "CELL_KEY",
    "COPY_MARKER",
    "DATASET_ID",
    "FORMAT_VERSION",
    "GENE_IDS",
    "GENE_NAMES",
    "GENE_TILE",
    "HISTOGRAM",
    "IS_DUPLICATE",
    "JOINID",
    "LAYER",
    "MEASUREMENT",
    "META_FORMAT",
    "META_LEDGER",
    "META_LIBRARY",
    "NONZERO_MEDIAN",
    "NUM_MEASURED",
    "NUM_NONZERO",
    "OBS_ID",
    "OWN_OBS",
    "RAW_SUM",
    "STAGING_SUFFIX",
    "histogram_options",
    "num_nonzero",
    "obs_to_arrow",
    "presence",
    "raw_sum",
    "table_options",
    "unify",
    "x_options",
]

MEASUREMENT = "RNA"
LAYER = "raw"
JOINID = "soma_joinid"

# obs columns that ingest adds; all but the first and last are Census's own names.
OBS_ID = "obs_id"
DATASET_ID = "dataset_id"
RAW_SUM = "raw_sum"
NUM_NONZERO = "nnz"
NUM_MEASURED = "n_measured_vars"
CELL_HASH = "cell_hash"
IS_DUPLICATE = "is_duplicate"
OWN_OBS = (OBS_ID, DATASET_ID, RAW_SUM, NUM_NONZERO, NUM_MEASURED, CELL_HASH, IS_DUPLICATE)

NONZERO_MEDIAN = "nonzero_median"  # var column: of normalised counts over the cells that express it
HISTOGRAM = "nonzero_histogram"  # varm: the sketch that the medians are from, so that it can grow

# Where other writers keep what we call by the first name of each tuple, in order of preference.
CELL_KEY = "cellray_cell_key"  # of frames in memory: Store.cell_keys
CELL_IDS = (OBS_ID, "observation_joinid")
GENE_IDS = ("feature_id", "var_id", "gene_id", "ensembl_id")
GENE_NAMES = ("feature_name", "gene_symbol", "gene_name", "symbol")

META_FORMAT = "cellray_format"
META_LEDGER = "cellray_ledger"
META_LIBRARY = "cellray_library_sizes"
FORMAT_VERSION = 1
STAGING_SUFFIX = ".ingesting"
COPY_MARKER = "cellray_copy.json"  # at the target of a copy until it is complete

ROW_TILE = 64
GENE_TILE = 1 << 20  # all genes of any measurement we know, with room to grow (ATAC peaks too)
CAPACITY = 65_536
ZSTD_LEVEL = 3
MAX_LABELS = 32_767  # more distinct strings than this are stored plain, not dictionary-encoded

_RESERVED = re.compile(r"^soma_")
_ZSTD: dict[str, Any] = {"_type": "ZstdFilter", "level": ZSTD_LEVEL}


def raw_sum(measurement: str) -> str:
    """The obs column with a cell's total counts in a measurement."""
    return RAW_SUM if measurement == MEASUREMENT else f"{RAW_SUM}_{measurement}"


def num_nonzero(measurement: str) -> str:
    """The obs column with how many features of a measurement a cell has."""
    return NUM_NONZERO if measurement == MEASUREMENT else f"{NUM_NONZERO}_{measurement}"


def presence(measurement: str) -> str:
    """The obs column that says whether a cell has a measurement at all; RNA has none."""
    return f"has_{measurement}"


def x_options() -> dict[str, Any]:
    """Creation options of X: tiles of 64 cells x all genes, capacity 65,536, zstd 3.

    Chosen by measurement among 38 layouts (``tests/benchmarks/results/layout.json``): the fastest
    at shuffled runs of 64 cells reads 13 % more of them, near the noise of the machine, and takes
    15 % more bytes. It reads them 1.8 times as fast as the tiles and zstd 9 of the Census (of 8,192
    cells; more in larger stores), and costs 4 % more bytes a cell.
    """
    create = {
        "capacity": CAPACITY,
        "allows_duplicates": True,
        "cell_order": "row-major",
        "tile_order": "row-major",
        "dims": {
            "soma_dim_0": {"tile": ROW_TILE, "filters": [_ZSTD]},
            "soma_dim_1": {"tile": GENE_TILE, "filters": ["ByteShuffleFilter", _ZSTD]},
        },
        "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", _ZSTD]}},
    }
    return {"tiledb": {"create": create}}


def table_options() -> dict[str, Any]:
    """Creation options of obs and var: capacity 65,536, tiles of 4,096 rows, zstd 3."""
    create = {
        "capacity": CAPACITY,
        "dims": {JOINID: {"tile": 4096, "filters": ["DoubleDeltaFilter", _ZSTD]}},
    }
    return {"tiledb": {"create": create}}


def histogram_options() -> dict[str, Any]:
    """Creation options of the histogram of a measurement's genes: zstd 3, small integers."""
    create = {
        "capacity": CAPACITY,
        "dims": {
            "soma_dim_0": {"tile": 4096, "filters": ["RleFilter", _ZSTD]},
            "soma_dim_1": {"tile": 4096, "filters": ["ByteShuffleFilter", _ZSTD]},
        },
        "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", _ZSTD]}},
    }
    return {"tiledb": {"create": create}}


def _column(values: pd.Series | pa.Array) -> pa.Array:
    """One obs column as Arrow: bool, int and float kept, everything else as strings."""
    if isinstance(values, pa.Array):
        return values
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(values.cat.categories.dtype) if _plain(values) else values
    kind = values.dtype.kind if hasattr(values.dtype, "kind") else "O"
    if kind == "b" or kind in "iu":
        return pa.Array.from_pandas(values)
    if kind == "f":
        wide = values.astype(np.float32) if values.dtype == np.float16 else values
        return pa.Array.from_pandas(wide)
    missing = values.isna().to_numpy()
    texts = values.astype(object).to_numpy(copy=True)
    if pd.api.types.infer_dtype(texts, skipna=True) == "boolean":
        return pa.array(np.where(missing, None, texts), pa.bool_())
    texts[~missing] = [str(t) for t in texts[~missing]]
    texts[missing] = None
    return pa.array(texts, pa.large_string())


def _plain(values: pd.Series) -> bool:
    """Whether a categorical is numbers or booleans in disguise, with none missing."""
    return values.cat.categories.dtype.kind in "biuf" and not bool(values.isna().any())


def to_pandas(table: pa.Table) -> pd.DataFrame:
    """A frame whose categorical columns have only labels that occur."""
    frame = table.to_pandas()
    for name in frame.columns:
        if isinstance(frame[name].dtype, pd.CategoricalDtype):
            frame[name] = frame[name].cat.remove_unused_categories()
    return frame


def obs_to_arrow(
    obs: pd.DataFrame | Iterable[tuple[str, pd.Series | pa.Array]],
) -> pa.Table:
    """The columns of an AnnData obs frame as Arrow, the index left out.

    A column whose name the store uses itself (``obs_id``, ``nnz`` ...) or that SOMA reserves
    (``soma_...``) becomes ``<name>_source``.

    Args:
        obs: the frame, or its columns by name, one after another.
    """
    if isinstance(obs, pd.DataFrame):
        frame = obs
        obs = ((str(name), frame.iloc[:, i]) for i, name in enumerate(frame.columns))
    found = [(name or "unnamed", _column(values)) for name, values in obs]
    given = {name for name, _ in found}
    columns: dict[str, pa.Array] = {}
    for name, values in found:
        label = name
        if label in OWN_OBS or _RESERVED.match(label):
            label = f"{_RESERVED.sub('', label)}_source"
            while label in given or label in columns:
                label += "_source"
        columns[label] = values
    return pa.table(columns)


def _common_type(types: Sequence[pa.DataType]) -> pa.DataType:
    """The type that holds all: equal ones stay, numbers widen, anything else becomes text."""
    distinct = set(types)
    if len(distinct) == 1:
        return types[0]
    integers = all(pa.types.is_integer(t) for t in distinct)
    if integers and pa.uint64() not in distinct:
        return pa.int64()
    if all(pa.types.is_integer(t) or pa.types.is_floating(t) for t in distinct):
        return pa.float64()
    return pa.large_string()


def repeated(text: str, count: int) -> pa.DictionaryArray:
    """A column of one label."""
    codes = pa.array(np.zeros(count, dtype=np.int32))
    return pa.DictionaryArray.from_arrays(codes, pa.array([text], pa.large_string()))


def _exact(column: pa.ChunkedArray, kind: pa.DataType) -> bool:
    """Whether numbers stay what they are in another type of number."""
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)) or column.type == kind:
        return True
    try:
        column.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _decoded(array: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without dictionary, and all text of one type."""
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    wanted = pa.large_string() if _is_text(kind) else kind
    return array if array.type == wanted else array.cast(wanted)


def unify(tables: Sequence[pa.Table]) -> pa.Table:
    """Stack obs tables: the union of their columns, null where a table has none.

    Columns keep their type if all tables agree; integers and floats of different width widen; a
    column whose kind differs between tables, or of numbers that no common type holds exactly (ids
    beyond 2^53 beside floats), becomes text. Strings are dictionary-encoded unless
    almost every cell has its own.

    Raises:
        DataError: there is no table.
    """
    if not tables:
        raise DataError("no obs tables to stack")
    names = list(dict.fromkeys(name for table in tables for name in table.column_names))
    columns = {}
    for name in names:
        given = [t.column(name) if name in t.column_names else None for t in tables]
        if all(c is None or _has_labels(c.type) for c in given):
            columns[name] = _labelled(given, [len(t) for t in tables])
            continue
        parts = [None if c is None else _decoded(c) for c in given]
        # an all-null column (nobody filled it in) says nothing about the type
        known = [p.type for p in parts if p is not None and p.null_count < len(p)]
        kind = _common_type(known) if known else pa.large_string()
        if not all(p is None or _exact(p, kind) for p in parts):
            kind = pa.large_string()
        filled = [
            pa.chunked_array([pa.nulls(len(t), kind)])
            if p is None or p.null_count == len(p)
            else p.cast(kind)
            for p, t in zip(parts, tables, strict=True)
        ]
        columns[name] = _encode(_one_chunk([c for p in filled for c in p.chunks], kind))
    return pa.table(columns)


def _has_labels(kind: pa.DataType) -> bool:
    return bool(pa.types.is_dictionary(kind) and _is_text(kind.value_type))


def _labelled(columns: Sequence[pa.ChunkedArray | None], lengths: Sequence[int]) -> pa.Array:
    """Stack columns of labels by their codes, without spelling them out."""
    kind = pa.dictionary(pa.int32(), pa.large_string())
    chunks = []
    for column, length in zip(columns, lengths, strict=True):
        if column is None:
            chunks.append(pa.nulls(length, kind))
            continue
        for chunk in column.chunks:
            labels = chunk.dictionary.cast(pa.large_string())
            chunks.append(pa.DictionaryArray.from_arrays(chunk.indices.cast(pa.int32()), labels))
    whole = _one_chunk(pa.chunked_array(chunks, kind).unify_dictionaries().chunks, kind)
    used = pc.unique(whole.indices.drop_null())
    if len(used) > MAX_LABELS or len(used) > max(64, len(whole) // 2):
        return whole.cast(pa.large_string())
    labels = whole.dictionary.take(used)
    new = np.zeros(max(1, len(whole.dictionary)), dtype=np.int32)
    new[used.to_numpy()] = np.arange(len(used), dtype=np.int32)
    missing = np.asarray(whole.indices.is_null())
    codes = new[whole.indices.fill_null(0).to_numpy()]
    return sort_labels(pa.DictionaryArray.from_arrays(pa.array(codes, mask=missing), labels))


def _one_chunk(chunks: list[pa.Array], kind: pa.DataType) -> pa.Array:
    """The chunks as one array; a single one is not copied."""
    if len(chunks) == 1:
        return chunks[0]
    return pa.concat_arrays(chunks) if chunks else pa.array([], kind)


def _encode(array: pa.Array) -> pa.Array:
    if not pa.types.is_large_string(array.type):
        return array
    head = array.slice(0, 2 * MAX_LABELS)
    if len(array) > len(head) and len(head.unique()) > MAX_LABELS:
        return array  # saves a table of all labels of a column of ids
    encoded = array.dictionary_encode()
    labels = len(encoded.dictionary)
    if labels > MAX_LABELS or labels > max(64, len(array) // 2):
        return array
    return sort_labels(encoded)


def sort_labels(encoded: pa.DictionaryArray) -> pa.DictionaryArray:
    """The same column with its labels in alphabetical order, so that codes do not say who came."""
    order = np.argsort(np.array(encoded.dictionary.to_pylist(), dtype=object), kind="stable")
    rank: npt.NDArray[np.int32] = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    old = encoded.indices.to_numpy(zero_copy_only=False)
    missing = np.asarray(encoded.indices.is_null())
    codes = rank[np.where(missing, 0, old).astype(np.int64)] if len(order) else np.zeros(len(old))
    indices = pa.array(codes.astype(np.int32), mask=missing)
    return pa.DictionaryArray.from_arrays(indices, encoded.dictionary.take(pa.array(order)))
