"""The h5ad files of an ingest: looked at before anything is written, then read block by block."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from cellray.core.errors import ConfigError, DataError, did_you_mean
from cellray.data import schema
from cellray.data.digest import cell_hashes, content_digest, hash64
from cellray.data.genes import GeneMapping, map_genes
from cellray.data.h5ad import MAX_COUNT, H5adFile, check_counts, file_of
from cellray.data.ingest_config import IngestConfig

__all__ = [
    "Cells",
    "Counts",
    "Source",
    "blocks",
    "digest_of_ids",
    "list_files",
    "look",
    "scan",
    "unique_ids",
]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

_ORGANISM_COLUMNS = ("organism", "organism_ontology_term_id", "species")
_FEATURE_TYPES = "feature_types"
_PRIMARY = "is_primary_data"
_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0")
_IDS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Counts:
    """Where a file's counts are and what they become; all that a reading of them needs.

    Attributes:
        path: the file as the user named it.
        layer: the layer with raw counts.
        rows: (F,) the row of the store's var that each of the file's features is written to, -1
            for those that are left out.
        spool: where a layer stored by columns is turned into rows, None for other layers.
    """

    path: str
    layer: str
    rows: I64
    spool: Path | None = None


@dataclass
class Source:
    """One file after the first look.

    Attributes:
        path: the file as the user named it.
        dataset_id: its name in the store.
        named: whether the user chose that name.
        layer: the layer with raw counts.
        obs: what its N cells say of themselves, as the store will have it.
        cell_ids: (N,) their ids, unique in the file.
        id_hashes: (N,) hashes of the ids.
        ids_sha256: of the sorted cell ids.
        taken: (F,) which rows of the file's var are taken.
        genes: the canonical gene of each row that is taken.
        stamp: size and time of the last change of the file.
        by_columns: whether the layer is stored by columns.
        rows: (F,) as in :class:`Counts`; set by the join.
        cells: what a reading of the whole file has gathered, if there was one.
    """

    path: str
    dataset_id: str
    named: bool
    layer: str
    obs: pa.Table
    cell_ids: pa.LargeStringArray
    id_hashes: U64
    ids_sha256: str
    taken: Bools
    genes: GeneMapping
    stamp: tuple[int, int]
    by_columns: bool
    rows: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    cells: Cells | None = None

    @property
    def num_cells(self) -> int:
        """N, before any are left out."""
        return len(self.cell_ids)

    @property
    def primary(self) -> Bools:
        """(N,) false for cells that say that they are copies (Census' ``is_primary_data``).

        Raises:
            DataError: the column says neither true nor false (or 1 or 0).
        """
        if _PRIMARY not in self.obs.column_names:
            return np.ones(self.num_cells, dtype=bool)
        column = self.obs.column(_PRIMARY)
        texts = pc.utf8_lower(column.cast(pa.large_string())).combine_chunks()
        known = pc.is_in(texts, pa.array([*_TRUE, *_FALSE, None], pa.large_string()))
        if not pc.all(known).as_py() and len(texts):
            strange = texts.filter(pc.invert(known))[0].as_py()
            raise DataError(
                f"'{self.path}': obs {_PRIMARY} holds {strange!r}; it must be true or false (or "
                "1 or 0). Correct the column, or set ingest.primary_only = false"
            )
        said = pc.invert(pc.is_in(texts, pa.array(_FALSE, pa.large_string())))
        result: Bools = said.to_numpy(zero_copy_only=False)
        return result

    def counts(self, spool: Path | None = None) -> Counts:
        """What a reading needs; after the join."""
        return Counts(self.path, self.layer, self.rows, spool if self.by_columns else None)


@dataclass
class Cells:
    """What is gathered of a file's cells while its blocks go by, one array a block.

    Attributes:
        hashes: content hash of each cell.
        sums: total counts of each cell.
        nonzero: detected genes of each cell.
        mito: mitochondrial counts of each cell.
    """

    hashes: list[U64] = field(default_factory=list)
    sums: list[npt.NDArray[np.float64]] = field(default_factory=list)
    nonzero: list[I64] = field(default_factory=list)
    mito: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def add(self, block: sparse.csr_matrix, gene_hashes: U64, mito: Bools) -> None:
        """Take in the next block of the file."""
        self.sums.append(_row_sums(block.data, block.indptr))
        self.nonzero.append(np.diff(block.indptr).astype(np.int64))
        self.hashes.append(cell_hashes(block.indptr, block.indices, block.data, gene_hashes))
        self.mito.append(_row_sums(block.data * mito[block.indices], block.indptr))

    def joined(self) -> dict[str, npt.NDArray[np.generic]]:
        """The same as one array each."""
        return {
            "hashes": np.concatenate([np.zeros(0, np.uint64), *self.hashes]),
            "sums": np.concatenate([np.zeros(0), *self.sums]),
            "nonzero": np.concatenate([np.zeros(0, np.int64), *self.nonzero]),
            "mito": np.concatenate([np.zeros(0), *self.mito]),
        }

    def content(self, id_hashes: U64) -> str:
        """SHA-256 of the file's cells, whatever its name, order or compression."""
        return content_digest(id_hashes, np.concatenate([np.zeros(0, np.uint64), *self.hashes]))


def _row_sums(
    values: npt.NDArray[np.float32], indptr: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    sums: npt.NDArray[np.float64] = np.diff(total[indptr])
    return sums


def digest_of_ids(ids: pa.LargeStringArray) -> str:
    """SHA-256 of the sorted ids, one a line."""
    ordered = ids.take(pc.array_sort_indices(ids))
    digest = hashlib.sha256()
    for i in range(0, len(ordered), _IDS_AT_ONCE):
        lines = "\n".join(ordered.slice(i, _IDS_AT_ONCE).to_pylist())
        digest.update((("\n" if i else "") + lines).encode())
    return digest.hexdigest()


def list_files(config: IngestConfig) -> list[str]:
    """The files that ``[ingest]`` names, globs filled in.

    Raises:
        ConfigError: no file, or not one dataset id a file.
        DataError: a glob matches nothing.
    """
    if not config.files:
        raise ConfigError("ingest.files is empty: give at least one h5ad file")
    found: list[str] = []
    for item in config.files:
        matches = sorted(glob.glob(item, recursive=True)) if glob.has_magic(item) else [item]
        if not matches:
            raise DataError(f"ingest.files: nothing matches '{item}' (in {Path.cwd()})")
        found += [m for m in matches if m not in found]
    given = config.dataset_ids
    if given and len(given) != len(found):
        raise ConfigError(
            f"ingest.dataset_ids names {len(given)} datasets for {len(found)} files: "
            f"{', '.join(found)}"
        )
    if "" in given:
        raise ConfigError("ingest.dataset_ids: a name is empty")
    return found


def unique_ids(config: IngestConfig, name: str, file: H5adFile, obs: pa.Table) -> pa.Array:
    """The cell ids of a file.

    Raises:
        DataError: no such column, or ids that repeat.
    """
    column = config.cell_id_column
    if column and column not in obs.column_names:
        allowed = obs.column_names
        raise DataError(
            f"'{name}': ingest.cell_id_column = '{column}' is not in obs."
            f"{did_you_mean(column, allowed)} obs has: {', '.join(allowed) or 'no columns'}"
        )
    ids = file.ids()
    if column:
        ids = pc.fill_null(obs.column(column).cast(pa.large_string()), "nan").combine_chunks()
    ordered = ids.take(pc.array_sort_indices(ids))
    again = pc.equal(ordered.slice(1), ordered.slice(0, max(0, len(ordered) - 1)))
    if pc.any(again).as_py():
        twice = ordered.slice(1).filter(again).unique().to_pylist()
        more = f" and {len(twice) - 5} more" if len(twice) > 5 else ""
        raise DataError(
            f"'{name}': cell ids occur more than once: {', '.join(map(repr, twice[:5]))}{more}. "
            "Make them unique (for cells of several samples, put the sample's name in front), or "
            "set ingest.cell_id_column"
        )
    return ids


def look(config: IngestConfig, name: str, *, dataset_id: str = "") -> Source:
    """Open a file and say everything that can be said of it without reading all its counts.

    Args:
        config: the ``[ingest]`` table.
        name: the file.
        dataset_id: its name in the store; "" takes the file's name.

    Raises:
        DataError: the file or its genes, cells or layer cannot be used; the message says why.
    """
    with H5adFile(name) as file:
        return _look(config, name, file, dataset_id)


def _claimed(config: IngestConfig, var: pd.DataFrame) -> Bools:
    """Which rows of var are no genes, because another measurement takes them."""
    others = {m.feature_types for m in config.measurements.values()} - {""}
    if not others or _FEATURE_TYPES not in var:
        return np.zeros(len(var), dtype=bool)
    return np.asarray(var[_FEATURE_TYPES].astype(str).isin(others))


def _stated(obs: pa.Table) -> list[str]:
    """Organisms that obs names."""
    column = next((c for c in _ORGANISM_COLUMNS if c in obs.column_names), None)
    return [] if column is None else [str(v) for v in obs.column(column).drop_null().unique()]


def _look(config: IngestConfig, name: str, file: H5adFile, given_id: str) -> Source:
    layer = file.choose_layer(config.layer)
    var = file.var(layer)
    shape = file.shape(layer)
    if shape != (file.num_cells, len(var)):
        raise DataError(
            f"'{name}': layer {layer} is {shape[0]} x {shape[1]}, but obs has {file.num_cells} "
            f"cells and var {len(var)} genes"
        )
    taken = ~_claimed(config, var)
    if 0 in shape or not taken.any():
        raise DataError(
            f"'{name}' has {shape[0]} cells and {int(taken.sum())} genes: nothing to ingest"
        )
    obs = schema.obs_to_arrow(file.obs())
    try:
        genes = map_genes(
            var[taken],
            organism=config.organism,
            id_column=config.gene_id_column,
            stated=_stated(obs),
            sum_duplicates=config.duplicate_genes == "sum",
        )
    except DataError as error:
        raise DataError(f"'{name}': {error}") from error
    ids = unique_ids(config, name, file, obs)
    status = file_of(name).stat()
    return Source(
        path=name,
        dataset_id=given_id or file_of(name).stem,
        layer=layer,
        obs=obs,
        cell_ids=ids,
        id_hashes=hash64(ids),
        ids_sha256=digest_of_ids(ids),
        taken=taken,
        genes=genes,
        named=bool(given_id),
        stamp=(status.st_size, status.st_mtime_ns),
        by_columns=file.by_columns(layer),
    )


def blocks(
    counts: Counts, cells_per_block: int, *, rows: tuple[int, int] | None = None
) -> Iterator[sparse.csr_matrix]:
    """Read the file's raw counts over the store's genes: zeros out, genes ascending.

    Args:
        counts: where they are.
        cells_per_block: rows at a time.
        rows: the first row and the one after the last; None for all.

    Yields:
        (cells, V) compressed rows in file order; counts of rows that mean one gene are added up.

    Raises:
        DataError: the file cannot be read, or a value is not a raw count.
    """
    with H5adFile(counts.path) as file:
        found = file.blocks(counts.layer, cells_per_block, rows=rows, spool=counts.spool)
        for first, block in found:
            yield _moved(counts, file, first, block)


def _moved(
    counts: Counts, file: H5adFile, first: int, block: sparse.csr_matrix
) -> sparse.csr_matrix:
    if len(block.data):
        last = first + block.shape[0] - 1
        where = f"'{counts.path}' layer {counts.layer}, cells {first}-{last},"
        try:
            check_counts(block.data, where=where)
        except DataError as error:
            raise DataError(f"{error}{file.advice(counts.layer)}") from error
    if len(block.indices) and int(block.indices.max()) >= len(counts.rows):
        raise DataError(f"'{counts.path}': layer {counts.layer} names a gene beyond var")
    genes, data, indptr = counts.rows[block.indices], block.data.astype(np.float32), block.indptr
    if (counts.rows < 0).any():
        wanted = genes >= 0
        indptr = np.concatenate([[0], np.cumsum(wanted)])[indptr]
        genes, data = genes[wanted], data[wanted]
    width = int(counts.rows.max()) + 1
    moved = sparse.csr_matrix((data, genes, indptr), shape=(block.shape[0], width))
    moved.sum_duplicates()
    # a sum that passes 2^24 in float32 may have been rounded down to it
    if len(moved.data) < len(data) and moved.data.max() >= MAX_COUNT:
        raise DataError(
            f"'{counts.path}' layer {counts.layer}: counts of rows with the same gene id add up to "
            f"{MAX_COUNT} or more, beyond which float32 cannot count; make the gene ids unique"
        )
    moved.eliminate_zeros()
    return moved


def scan(source: Source, cells_per_block: int, gene_hashes: U64, mito: Bools) -> Cells:
    """Read the whole file once without writing it; the second time, remember the first."""
    if source.cells is None:
        cells = Cells()
        for block in blocks(source.counts(), cells_per_block):
            cells.add(block, gene_hashes, mito)
        source.cells = cells
    return source.cells
