"""What an ingest adds to a store: joined genes, and refusal of data that is there already."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cellray.core.errors import DataError
from cellray.data import schema
from cellray.data.digest import hash64
from cellray.data.sources import Source, scan

__all__ = ["Clock", "Existing", "JoinedGenes", "join", "refuse_overlap", "refuse_same_content"]

Progress = Callable[[str], None]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

_PROGRESS_EVERY_S = 2.0


@dataclass
class Existing:
    """The store as it is before the ingest; empty if there is none.

    Attributes:
        feature_ids: its genes.
        feature_names: their symbols.
        gene_cells: how many cells express each.
        obs: its cells in joinid order, without joinid; None if there is no store.
        ledger: one entry for each file that is in it.
    """

    feature_ids: list[str] = field(default_factory=list)
    feature_names: list[str] = field(default_factory=list)
    gene_cells: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    obs: pa.Table | None = None
    ledger: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_cells(self) -> int:
        """Cells of the store."""
        return 0 if self.obs is None else len(self.obs)


@dataclass
class JoinedGenes:
    """The genes of store and files together: var of the new store.

    Attributes:
        ids: V canonical ids, those of the old store first.
        names: V symbols.
        new: for each file, how many genes it brings that were not there before it.
        hashes: (V,) hash of each id.
    """

    ids: list[str]
    names: list[str]
    new: list[int]
    hashes: U64


def join(existing: Existing, files: Sequence[Source]) -> JoinedGenes:
    """Union of the genes, old rows first; sets ``rows`` of each file."""
    ids, names = list(existing.feature_ids), list(existing.feature_names)
    row_of = {gene: row for row, gene in enumerate(ids)}
    new = []
    for source in files:
        before = len(ids)
        for gene, name in zip(source.genes.feature_ids, source.genes.feature_names, strict=True):
            if gene not in row_of:
                row_of[gene] = len(ids)
                ids.append(gene)
                names.append(name)
        source.rows = np.array([row_of[g] for g in source.genes.feature_ids], dtype=np.int64)
        new.append(len(ids) - before)
    return JoinedGenes(ids, names, new, hash64(ids))


def _old_cell_ids(existing: Existing, dataset_id: str) -> set[str]:
    if existing.obs is None:
        return set()
    datasets = existing.obs.column(schema.DATASET_ID).to_pandas().astype(str)
    ids = existing.obs.column(schema.OBS_ID).to_pandas().astype(str)
    return set(ids[(datasets == dataset_id).to_numpy()])


def refuse_same_content(source: Source, content: str, entry: dict[str, Any]) -> None:
    """Refuse a file whose cells and counts are those of a ledger entry.

    Raises:
        DataError: they are.
    """
    if content == entry["content_sha256"]:
        raise DataError(
            f"'{source.path}' holds the same cells and counts as '{entry['file']}', which is in "
            f"the store already as dataset '{entry['dataset_id']}'; nothing was written"
        )


def refuse_overlap(
    existing: Existing, files: Sequence[Source], genes: JoinedGenes, cells_per_block: int
) -> None:
    """Refuse data that is there already, and datasets or cells whose names are taken.

    A file is read through only if its names give rise to suspicion; all others are compared by
    content when they are written.

    Raises:
        DataError: says which file and dataset hold the data, or own the name.
    """
    entries = list(existing.ledger)
    ids_of: dict[str, set[str]] = {}
    for source in files:
        same_ids = [e for e in entries if e["ids_sha256"] == source.ids_sha256]
        dataset = source.dataset_id
        known = [e for e in entries if e["dataset_id"] == dataset]
        taken = ids_of.setdefault(dataset, _old_cell_ids(existing, dataset))
        shared = sorted(taken.intersection(source.cell_ids.tolist()))
        if same_ids or shared or (known and not source.named):
            content = _content(source, genes, cells_per_block)
            for entry in entries:
                if entry["content_sha256"] is None:
                    entry["content_sha256"] = _content(entry["source"], genes, cells_per_block)
                refuse_same_content(source, content, entry)
        if known and not source.named:
            raise DataError(
                f"'{source.path}' would be dataset '{dataset}', which '{known[0]['file']}' is "
                "already. Name the files with ingest.dataset_ids (the same name adds to it)"
            )
        if shared:
            raise DataError(
                f"'{source.path}': {len(shared)} cell ids are in dataset '{dataset}' already, "
                f"e.g. {', '.join(map(repr, shared[:3]))}. Give it another name with "
                "ingest.dataset_ids, or make the ids unique"
            )
        taken |= set(source.cell_ids.tolist())
        entries.append(
            {
                "file": source.path,
                "dataset_id": dataset,
                "ids_sha256": source.ids_sha256,
                "content_sha256": None,
                "source": source,
            }
        )


def _content(source: Source, genes: JoinedGenes, cells_per_block: int) -> str:
    return scan(source, cells_per_block, genes.hashes).content(source.cell_ids)


class Clock:
    """Says how far an ingest is.

    Args:
        progress: is told, a line at a time.
        num_files: files in all.
        num_cells: cells in all.
    """

    def __init__(self, progress: Progress, num_files: int, num_cells: int) -> None:
        self._progress, self._num_files, self._num_cells = progress, num_files, num_cells
        self._started = self._said = time.monotonic()
        self.done = 0

    def begin(self, number: int, source: Source) -> None:
        """File ``number`` (from 1) is next."""
        genes = source.genes
        whose = f"{genes.organism} genes" if genes.organism else "genes of no known organism"
        self._progress(
            f"file {number}/{self._num_files} {source.path}: {source.num_cells:,} cells from "
            f"{source.layer}, {whose}, {genes.num_ensembl:,} of {len(genes.feature_ids):,} with "
            "an Ensembl id"
        )
        if genes.merged:
            pairs = [f"{g} = {' + '.join(names)}" for g, names in list(genes.merged.items())[:3]]
            self._progress(
                f"  {len(genes.merged):,} genes are named by several rows, whose counts are "
                f"added up: {'; '.join(pairs)}"
            )

    def cells(self, number: int, count: int, *, last: bool = False) -> None:
        """``count`` more cells are done; said every two seconds and at a file's end."""
        self.done += count
        now = time.monotonic()
        if last or now - self._said >= _PROGRESS_EVERY_S:
            self._said = now
            rate = self.done / max(now - self._started, 1e-9)
            left = (self._num_cells - self.done) / max(rate, 1e-9)
            self._progress(
                f"file {number}/{self._num_files}: {self.done:,} of {self._num_cells:,} cells, "
                f"{rate:,.0f} cells/s, ETA {left:,.0f} s"
            )
