"""What an ingest has done: for each file, and in sum; printed, and kept in the store's ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = ["FileReport", "IngestReport", "MeasurementReport", "sum_lines"]


@dataclass(frozen=True)
class MeasurementReport:
    """What became of what else was measured in the cells of one file.

    Attributes:
        origin: where it is: a file, an obsm or a feature type.
        layer: the layer that was read.
        cells: cells written that have it.
        cells_absent: cells written that lack it.
        cells_left_out: cells that it has, but that are not among the cells written.
        features: its features.
        features_new: those the store did not have before.
        counts: sum of all counts written.
    """

    origin: str
    layer: str
    cells: int
    cells_absent: int
    cells_left_out: int
    features: int
    features_new: int
    counts: float


@dataclass(frozen=True)
class FileReport:
    """What became of one file.

    Attributes:
        file: its path as given.
        dataset_id: its name in obs ``dataset_id``.
        layer: the layer that was read.
        cells_read: cells of the file.
        cells: cells written.
        cells_dropped: cells left out by a rule.
        dropped: rule -> how many cells it left out (the first rule that a cell broke).
        duplicates: cells with the counts of an earlier cell of the files or the store, flagged,
            dropped or kept as ``ingest.duplicate_cells`` says.
        genes: distinct genes of the file.
        genes_new: those the store did not have before.
        genes_matched: those that it had.
        genes_ensembl: rows of var whose canonical id is an Ensembl id.
        genes_merged: canonical id -> rows of the file that were added up under it.
        organism: whose symbol table was used, "" for none.
        counts: sum of all counts written.
        counts_lost: sum of all counts of the cells left out.
        content_sha256: of cell ids, gene ids and counts, whatever the file's name or compression.
        ids_sha256: of the cell ids.
        measurements: what became of the other measurements of its cells, by name.
    """

    file: str
    dataset_id: str
    layer: str
    cells_read: int
    cells: int
    cells_dropped: int
    dropped: Mapping[str, int]
    duplicates: int
    genes: int
    genes_new: int
    genes_matched: int
    genes_ensembl: int
    genes_merged: Mapping[str, tuple[str, ...]]
    organism: str
    counts: float
    counts_lost: float
    content_sha256: str
    ids_sha256: str
    measurements: Mapping[str, MeasurementReport] = field(default_factory=dict)

    @staticmethod
    def of(entry: Mapping[str, Any]) -> FileReport:
        """The report that an entry of a store's ledger keeps."""
        known = {f.name: entry[f.name] for f in fields(FileReport) if f.name in entry}
        told = {n: MeasurementReport(**m) for n, m in entry.get("measurements", {}).items()}
        return FileReport(**{**known, "measurements": told})

    def lines(self, duplicate_cells: str) -> list[str]:
        """The report in words."""
        rules = ", ".join(f"{n} by {rule}" for rule, n in self.dropped.items())
        told = [
            f"{self.file}: {self.cells} cells x {self.genes} genes from {self.layer} as dataset "
            f"'{self.dataset_id}', {self.genes_new} genes new to the store, "
            f"{self.genes_matched} known, {len(self.genes_merged)} merged of several rows",
            f"  {self.cells_read} cells read, {self.cells_dropped} left out"
            + (f" ({rules})" if rules else "")
            + f"; {self.counts:.0f} counts written, {self.counts_lost:.0f} lost in cells left out",
        ]
        if self.duplicates:
            done = {"flag": "flagged", "drop": "left out", "keep": "kept"}[duplicate_cells]
            told.append(f"  {self.duplicates} exact duplicates of earlier cells, {done}")
        told += [
            f"  {name} from {m.origin}: {m.cells} cells x {m.features} features "
            f"({m.features_new} new), {m.cells_absent} cells lack it, {m.cells_left_out} of its "
            "cells left out"
            for name, m in self.measurements.items()
        ]
        return told


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
        workers: processes that read and wrote.
        parts_taken_over: parts that an interrupted ingest had finished.
        duplicate_cells: what was done with duplicates.
    """

    uri: str
    num_cells: int
    num_genes: int
    files: tuple[FileReport, ...]
    seconds: float
    cells_per_s: float
    workers: int = 1
    parts_taken_over: int = 0
    duplicate_cells: str = "flag"

    def lines(self) -> list[str]:
        """The report in words."""
        told = [line for file in self.files for line in file.lines(self.duplicate_cells)]
        return [
            *told,
            f"store: {self.uri} ({self.num_cells} cells x {self.num_genes} genes, "
            f"{self.cells_per_s:.0f} cells/s)",
        ]


def sum_lines(ledger: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sum over all files of a store's ledger, in words; none for older entries."""
    known = [entry for entry in ledger if "cells_read" in entry]
    if not known:
        return []
    dropped: dict[str, int] = {}
    for entry in known:
        for rule, count in entry["dropped"].items():
            dropped[rule] = dropped.get(rule, 0) + count
    rules = ", ".join(f"{n} by {rule}" for rule, n in dropped.items())
    read, written = (sum(e[key] for e in known) for key in ("cells_read", "cells"))
    lost, counts = (sum(e[key] for e in known) for key in ("counts_lost", "counts"))
    return [
        f"{read} cells read, {written} written, {read - written} left out"
        + (f" ({rules})" if rules else "")
        + f", {sum(e['duplicates'] for e in known)} exact duplicates",
        f"{counts:.0f} counts written, {lost:.0f} lost in cells left out",
    ]
