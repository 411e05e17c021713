"""From h5ad files to one SOMA experiment: checked, joined on genes, written, published whole.

How a file becomes cells of a store
    1. Every file is opened and looked at before anything is written: layer, genes, cell ids,
       names of datasets, whether its cells are in the store already.
    2. The genes of all files and of the store are joined; new genes are appended to var.
    3. Blocks of rows are checked (finite, not negative, whole numbers), moved to the joined genes,
       hashed and written as one fragment of X each.
    4. obs and var are written whole, the ledger is noted, and the store takes its place by a
       rename (see :mod:`cellray.data.staging`). An append shares the old store's X fragments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tiledbsoma
from pydantic import Field

from cellray.core.errors import DataError
from cellray.core.section import Section
from cellray.data import schema, sources
from cellray.data.joining import (
    Clock,
    Existing,
    JoinedGenes,
    join,
    refuse_overlap,
    refuse_same_content,
)
from cellray.data.locate import local_path
from cellray.data.soma import open_store
from cellray.data.sources import Cells, Source
from cellray.data.staging import staging
from cellray.data.writer import create_groups, measurement_path, open_x, write_block, write_table

__all__ = ["FileReport", "IngestConfig", "IngestReport", "ingest"]

Progress = Callable[[str], None]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


class IngestConfig(Section):
    """The ``[ingest]`` table.

    Attributes:
        files: h5ad files; paths and globs.
        uri: the store to make or to append to, a local folder.
        layer: where the raw counts are: ``X``, ``raw.X``, the name of a layer, or ``auto``: X if
            it holds raw counts, else raw.X.
        organism: whose table maps symbols to Ensembl ids: ``human``, ``mouse`` or ``auto``.
        gene_id_column: var column whose ids are preferred to the index; ``auto``: a column of
            Ensembl ids, consulted where the index holds none.
        dataset_ids: one name a file; default: the file names without ``.h5ad``.
        cell_id_column: obs column with the cell ids; "" takes the index.
        duplicate_genes: ``error``, or ``sum``: add the counts of rows with the same gene id.
        append: add to a store that is there; false refuses if there is one.
        cells_per_block: rows read, checked and written at a time.
        min_genes_per_cell: cells with fewer detected genes are left out.
    """

    files: list[str]
    uri: str
    layer: str = "auto"
    organism: Literal["auto", "human", "mouse"] = "auto"
    gene_id_column: str = "auto"
    dataset_ids: list[str] = []
    cell_id_column: str = ""
    duplicate_genes: Literal["error", "sum"] = "error"
    append: bool = True
    cells_per_block: int = Field(default=4096, ge=1)
    min_genes_per_cell: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class FileReport:
    """What became of one file.

    Attributes:
        file: its path as given.
        dataset_id: its name in obs ``dataset_id``.
        layer: the layer that was read.
        cells: cells written.
        cells_dropped: cells with fewer genes than ``min_genes_per_cell``.
        genes: distinct genes of the file.
        genes_new: those the store did not have before.
        genes_ensembl: rows of var whose canonical id is an Ensembl id.
        genes_merged: canonical id -> rows of the file that were added up under it.
        organism: whose symbol table was used, "" for none.
        counts: sum of all counts written.
        content_sha256: of cell ids, gene ids and counts, whatever the file's name or compression.
        ids_sha256: of the cell ids.
    """

    file: str
    dataset_id: str
    layer: str
    cells: int
    cells_dropped: int
    genes: int
    genes_new: int
    genes_ensembl: int
    genes_merged: dict[str, tuple[str, ...]]
    organism: str
    counts: float
    content_sha256: str
    ids_sha256: str


@dataclass(frozen=True)
class IngestReport:
    """What an ingest has done.

    Attributes:
        uri: the store.
        num_cells: cells in it now.
        num_genes: genes in it now.
        files: what became of each file.
        seconds: wall time.
        cells_per_s: cells read a second.
    """

    uri: str
    num_cells: int
    num_genes: int
    files: tuple[FileReport, ...]
    seconds: float
    cells_per_s: float


def _existing(config: IngestConfig, target: Path) -> Existing:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return Existing()
    store = open_store(str(target))
    with tiledbsoma.open(str(target)) as experiment:
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
        var = experiment.ms[schema.MEASUREMENT].var.read().concat().to_pandas()
        obs = experiment.obs.read().concat()
    var = var.sort_values(schema.JOINID)
    order = np.argsort(obs.column(schema.JOINID).to_numpy(), kind="stable")
    return Existing(
        feature_ids=var["feature_id"].tolist(),
        feature_names=var["feature_name"].tolist(),
        gene_cells=var[schema.NUM_NONZERO].to_numpy(dtype=np.int64),
        obs=obs.take(pa.array(order)).drop_columns([schema.JOINID]),
        ledger=store.ledger,
    )


def _kept(config: IngestConfig, source: Source, genes: JoinedGenes) -> npt.NDArray[np.bool_]:
    """Which cells have enough genes."""
    if config.min_genes_per_cell == 0:
        return np.ones(source.num_cells, dtype=bool)
    cells = sources.scan(source, config.cells_per_block, genes.hashes)
    kept: npt.NDArray[np.bool_] = np.concatenate(cells.nonzero) >= config.min_genes_per_cell
    return kept


def _own_columns(source: Source, cells: Cells, kept: npt.NDArray[np.bool_]) -> pa.Table:
    count = int(kept.sum())
    measured = len(set(source.genes.feature_ids))
    return pa.table(
        {
            schema.OBS_ID: pa.array(source.cell_ids[kept].tolist(), pa.large_string()),
            schema.DATASET_ID: pa.array([source.dataset_id] * count, pa.large_string()),
            schema.RAW_SUM: np.concatenate(cells.sums)[kept],
            schema.NUM_NONZERO: np.concatenate(cells.nonzero)[kept],
            schema.NUM_MEASURED: np.full(count, measured, dtype=np.int64),
            schema.CELL_HASH: np.concatenate(cells.hashes)[kept],
        }
    )


@dataclass
class _Writer:
    """Writes the cells of one file after another."""

    config: IngestConfig
    genes: JoinedGenes
    clock: Clock
    ledger: list[dict[str, Any]]
    obs: list[pa.Table]
    gene_cells: I64
    next_joinid: int
    reports: list[FileReport] = field(default_factory=list)

    def write(self, x: Any, number: int, source: Source, kept: npt.NDArray[np.bool_]) -> None:
        """Append the kept cells of ``source`` to X and gather its obs."""
        self.clock.begin(number, source)
        cells, row, counts = Cells(), 0, 0.0
        for block in sources.blocks(source, self.config.cells_per_block):
            cells.add(block, self.genes.hashes)
            part = kept[row : row + block.shape[0]]
            row += block.shape[0]
            block = block if part.all() else block[part]
            write_block(x, block, self.next_joinid, len(self.genes.ids))
            self.gene_cells += np.bincount(block.indices, minlength=len(self.genes.ids))
            self.next_joinid += block.shape[0]
            counts += float(block.data.sum(dtype=np.float64))
            self.clock.cells(number, len(part), last=row == source.num_cells)
        content = cells.content(source.cell_ids)
        for entry in self.ledger:
            refuse_same_content(source, content, entry)
        own = _own_columns(source, cells, kept)
        rest = schema.obs_to_arrow(source.obs[kept])
        for name in rest.column_names:
            own = own.append_column(name, rest.column(name))
        self.obs.append(own)
        self._report(number, source, kept, counts, content)

    def _report(
        self,
        number: int,
        source: Source,
        kept: npt.NDArray[np.bool_],
        counts: float,
        content: str,
    ) -> None:
        report = FileReport(
            file=source.path,
            dataset_id=source.dataset_id,
            layer=source.layer,
            cells=int(kept.sum()),
            cells_dropped=int((~kept).sum()),
            genes=len(set(source.genes.feature_ids)),
            genes_new=self.genes.new[number - 1],
            genes_ensembl=source.genes.num_ensembl,
            genes_merged=dict(source.genes.merged),
            organism=source.genes.organism,
            counts=counts,
            content_sha256=content,
            ids_sha256=source.ids_sha256,
        )
        self.reports.append(report)
        self.ledger.append(asdict(report))


def _build(
    config: IngestConfig, target: Path, place: Path, files: Sequence[Source], progress: Progress
) -> _Writer:
    """Build the new store at ``place``."""
    existing = _existing(config, target)
    genes = join(existing, files)
    refuse_overlap(existing, files, genes, config.cells_per_block)
    kept = [_kept(config, source, genes) for source in files]
    total = existing.num_cells + sum(int(k.sum()) for k in kept)
    if total == 0:
        raise DataError(
            f"no cell has ingest.min_genes_per_cell = {config.min_genes_per_cell} genes; lower it"
        )
    old = existing.gene_cells
    writer = _Writer(
        config=config,
        genes=genes,
        clock=Clock(progress, len(files), sum(s.num_cells for s in files)),
        ledger=existing.ledger,
        obs=[] if existing.obs is None else [existing.obs],
        gene_cells=np.concatenate([old, np.zeros(len(genes.ids) - len(old), np.int64)]),
        next_joinid=existing.num_cells,
    )
    shape = (total, len(genes.ids))
    with open_x(target, place, shape, append=existing.obs is not None) as x:
        for number, (source, mask) in enumerate(zip(files, kept, strict=True), start=1):
            writer.write(x, number, source, mask)
    assert writer.next_joinid == total, f"wrote {writer.next_joinid} cells of {total}"
    write_table(place / "obs", schema.unify(writer.obs))
    var = {
        "feature_id": pa.array(genes.ids, pa.large_string()),
        "feature_name": pa.array(genes.names, pa.large_string()),
        schema.NUM_NONZERO: writer.gene_cells,
    }
    write_table(measurement_path(place) / "var", pa.table(var))
    create_groups(place, writer.ledger)
    return writer


def ingest(config: IngestConfig, *, progress: Progress = lambda _: None) -> IngestReport:
    """Read h5ad files into a SOMA experiment, making it or adding to it.

    The store at ``config.uri`` changes at once or not at all: an ingest that fails or is killed
    leaves it as it was, and can be run again.

    Args:
        config: the ``[ingest]`` table.
        progress: is told how far the work is, a line at a time.

    Raises:
        ConfigError: no files, or not one dataset id a file.
        DataError: a file cannot be used (missing, damaged, no raw counts, ids that repeat), its
            cells are in the store already, or the store cannot be written.
    """
    started = time.monotonic()
    target = local_path(config.uri)
    if target is None:
        raise DataError(
            f"ingest writes to a local folder, not to '{config.uri}'; ingest locally, then copy "
            "the folder to the object store"
        )
    names = sources.list_files(config)
    given = config.dataset_ids or [""] * len(names)
    files = [sources.look(config, n, dataset_id=d) for n, d in zip(names, given, strict=True)]
    with staging(target) as place:
        try:
            writer = _build(config, target, place, files, progress)
        except (tiledbsoma.SOMAError, OSError) as error:
            raise DataError(f"writing '{target}' failed: {error}") from error
    seconds = time.monotonic() - started
    return IngestReport(
        uri=str(target),
        num_cells=writer.next_joinid,
        num_genes=len(writer.genes.ids),
        files=tuple(writer.reports),
        seconds=seconds,
        cells_per_s=writer.clock.done / max(seconds, 1e-9),
    )
