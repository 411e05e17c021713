"""The h5ad files of an ingest: looked at before anything is written, then read block by block."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from cellray.core.errors import ConfigError, DataError, did_you_mean
from cellray.data.digest import cell_hashes, content_digest
from cellray.data.genes import GeneMapping, map_genes
from cellray.data.h5ad import H5adFile, check_counts

if TYPE_CHECKING:
    from cellray.data.ingest import IngestConfig

__all__ = ["Cells", "Source", "blocks", "list_files", "look", "scan"]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

_ORGANISM_COLUMNS = ("organism", "organism_ontology_term_id", "species")


@dataclass
class Source:
    """One file after the first look.

    Attributes:
        path: the file as the user named it.
        dataset_id: its name in the store.
        named: whether the user chose that name.
        layer: the layer with raw counts.
        obs: its N cells.
        cell_ids: (N,) their ids, unique in the file.
        ids_sha256: of the sorted cell ids.
        genes: the canonical gene of each of its V rows of var.
        rows: (V,) the row of the store's var that each gene is written to; set by the join.
        cells: what a reading of the whole file has gathered, if there was one.
    """

    path: str
    dataset_id: str
    named: bool
    layer: str
    obs: pd.DataFrame
    cell_ids: npt.NDArray[np.str_]
    ids_sha256: str
    genes: GeneMapping
    rows: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    cells: Cells | None = None

    @property
    def num_cells(self) -> int:
        """N, before any are left out."""
        return len(self.cell_ids)


@dataclass
class Cells:
    """What is gathered of a file's cells while its blocks go by, one array a block.

    Attributes:
        hashes: content hash of each cell.
        sums: total counts of each cell.
        nonzero: detected genes of each cell.
    """

    hashes: list[U64] = field(default_factory=list)
    sums: list[npt.NDArray[np.float64]] = field(default_factory=list)
    nonzero: list[I64] = field(default_factory=list)

    def add(self, block: sparse.csr_matrix, gene_hashes: U64) -> None:
        """Take in the next block of the file."""
        total = np.concatenate([[0.0], np.cumsum(block.data, dtype=np.float64)])
        self.sums.append(np.diff(total[block.indptr]))
        self.nonzero.append(np.diff(block.indptr).astype(np.int64))
        self.hashes.append(cell_hashes(block.indptr, block.indices, block.data, gene_hashes))

    def content(self, cell_ids: npt.NDArray[np.str_]) -> str:
        """SHA-256 of the file's cells, whatever its name, order or compression."""
        return content_digest(cell_ids, np.concatenate(self.hashes))


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


def _cell_ids(config: IngestConfig, name: str, obs: pd.DataFrame) -> npt.NDArray[np.str_]:
    column = config.cell_id_column
    if column and column not in obs.columns:
        allowed = [str(c) for c in obs.columns]
        raise DataError(
            f"'{name}': ingest.cell_id_column = '{column}' is not in obs."
            f"{did_you_mean(column, allowed)} obs has: {', '.join(allowed) or 'no columns'}"
        )
    ids = pd.Series([str(c) for c in (obs[column] if column else obs.index)], dtype=object)
    if ids.duplicated().any():
        twice = list(dict.fromkeys(ids[ids.duplicated()]))
        more = f" and {len(twice) - 5} more" if len(twice) > 5 else ""
        raise DataError(
            f"'{name}': cell ids occur more than once: {', '.join(map(repr, twice[:5]))}{more}. "
            "Make them unique (for cells of several samples, put the sample's name in front), or "
            "set ingest.cell_id_column"
        )
    result: npt.NDArray[np.str_] = ids.to_numpy(dtype=np.str_)
    return result


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


def _look(config: IngestConfig, name: str, file: H5adFile, given_id: str) -> Source:
    layer = file.choose_layer(config.layer)
    obs, var = file.obs(), file.var(layer)
    shape = file.shape(layer)
    if shape != (len(obs), len(var)):
        raise DataError(
            f"'{name}': layer {layer} is {shape[0]} x {shape[1]}, but obs has {len(obs)} cells "
            f"and var {len(var)} genes"
        )
    if 0 in shape:
        raise DataError(f"'{name}' has {shape[0]} cells and {shape[1]} genes: nothing to ingest")
    column = next((c for c in _ORGANISM_COLUMNS if c in obs.columns), None)
    try:
        genes = map_genes(
            var,
            organism=config.organism,
            id_column=config.gene_id_column,
            stated=[] if column is None else [str(v) for v in obs[column].dropna().unique()],
            sum_duplicates=config.duplicate_genes == "sum",
        )
    except DataError as error:
        raise DataError(f"'{name}': {error}") from error
    ids = _cell_ids(config, name, obs)
    return Source(
        path=name,
        dataset_id=given_id or Path(name).stem,
        layer=layer,
        obs=obs,
        cell_ids=ids,
        ids_sha256=hashlib.sha256("\n".join(sorted(ids.tolist())).encode()).hexdigest(),
        genes=genes,
        named=bool(given_id),
    )


def blocks(source: Source, cells_per_block: int) -> Iterator[sparse.csr_matrix]:
    """Read the file's raw counts over the store's genes: zeros out, genes ascending.

    Yields:
        (cells, V) compressed rows in file order; counts of rows that mean one gene are added up.

    Raises:
        DataError: the file cannot be read, or a value is not a raw count.
    """
    with H5adFile(source.path) as file:
        yield from _blocks(source, file, cells_per_block)


def _blocks(source: Source, file: H5adFile, cells_per_block: int) -> Iterator[sparse.csr_matrix]:
    width = int(source.rows.max()) + 1
    for first, block in file.blocks(source.layer, cells_per_block):
        if len(block.data):
            last = first + block.shape[0] - 1
            where = f"'{source.path}' layer {source.layer}, cells {first}-{last},"
            try:
                check_counts(block.data, where=where)
            except DataError as error:
                raise DataError(f"{error}{file.advice(source.layer)}") from error
        if len(block.indices) and int(block.indices.max()) >= len(source.rows):
            raise DataError(f"'{source.path}': layer {source.layer} names a gene beyond var")
        parts = (block.data.astype(np.float32), source.rows[block.indices], block.indptr)
        moved = sparse.csr_matrix(parts, shape=(block.shape[0], width))
        moved.sum_duplicates()
        moved.eliminate_zeros()
        yield moved


def scan(source: Source, cells_per_block: int, gene_hashes: U64) -> Cells:
    """Read the whole file once without writing it; the second time, remember the first."""
    if source.cells is None:
        cells = Cells()
        for block in blocks(source, cells_per_block):
            cells.add(block, gene_hashes)
        source.cells = cells
    return source.cells
