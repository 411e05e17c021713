"""What an ingest adds to a store: joined genes, and refusal of data that is there already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cellray.core.errors import DataError
from cellray.data import schema
from cellray.data.digest import hash64
from cellray.data.sketch import Sketch
from cellray.data.sources import Source, scan

__all__ = ["Existing", "JoinedGenes", "OldVar", "join", "refuse_overlap", "refuse_same_content"]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


@dataclass
class OldVar:
    """The features of a measurement before the ingest.

    Attributes:
        ids: canonical ids.
        names: symbols.
        num_cells: how many cells express each.
        sketch: their normalised counts.
    """

    ids: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    num_cells: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    sketch: Sketch = field(default_factory=Sketch)


@dataclass
class Existing:
    """The store as it is before the ingest; empty if there is none.

    Attributes:
        var: the features of each measurement that it has.
        obs: its cells in joinid order, without joinid; None if there is no store.
        ledger: one entry for each file that is in it.
    """

    var: dict[str, OldVar] = field(default_factory=dict)
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
        mito: (V,) which of them are mitochondrial: symbols that start with ``MT-`` or ``mt-``.
    """

    ids: list[str]
    names: list[str]
    new: list[int]
    hashes: U64
    mito: npt.NDArray[np.bool_]


def join(old: OldVar, files: Sequence[Source]) -> JoinedGenes:
    """Union of the genes, old rows first; sets ``rows`` of each file."""
    ids, names = list(old.ids), list(old.names)
    row_of = {gene: row for row, gene in enumerate(ids)}
    new = []
    for source in files:
        before = len(ids)
        for gene, name in zip(source.genes.feature_ids, source.genes.feature_names, strict=True):
            if gene not in row_of:
                row_of[gene] = len(ids)
                ids.append(gene)
                names.append(name)
        source.rows = np.full(len(source.taken), -1, dtype=np.int64)
        source.rows[source.taken] = [row_of[g] for g in source.genes.feature_ids]
        new.append(len(ids) - before)
    mito = np.array([n.startswith(("MT-", "mt-")) for n in names], dtype=bool)
    return JoinedGenes(ids, names, new, hash64(ids), mito)


def _old_cell_ids(existing: Existing, dataset_id: str) -> U64:
    """Hashes of the cell ids that a dataset of the store has."""
    if existing.obs is None:
        return np.zeros(0, np.uint64)
    datasets = existing.obs.column(schema.DATASET_ID).cast(pa.large_string())
    ids = existing.obs.column(schema.OBS_ID).filter(pc.equal(datasets, dataset_id))
    return hash64(ids.cast(pa.large_string()).combine_chunks())


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
    ids_of: dict[str, U64] = {}
    for source in files:
        same_ids = [e for e in entries if e["ids_sha256"] == source.ids_sha256]
        dataset = source.dataset_id
        known = [e for e in entries if e["dataset_id"] == dataset]
        taken = ids_of.setdefault(dataset, _old_cell_ids(existing, dataset))
        met = np.isin(source.id_hashes, taken)
        shared = sorted(source.cell_ids.filter(pa.array(met)).to_pylist())
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
        ids_of[dataset] = np.concatenate([taken, source.id_hashes])
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
    cells = scan(source, cells_per_block, genes.hashes, genes.mito)
    return cells.content(source.id_hashes)
