"""Which cells of an ingest are kept: quality rules, Census' copies, exact duplicates.

Legend: N cells of a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellray.core.errors import DataError
from cellray.data.ingest_config import IngestConfig

__all__ = ["CellFigures", "choose", "duplicates", "needs_scan", "refuse_idle", "refuse_nothing"]

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class CellFigures:
    """What a reading measured of a file's N cells.

    Attributes:
        hashes: (N,) content hash.
        sums: (N,) total counts.
        nonzero: (N,) detected genes.
        mito: (N,) mitochondrial counts.
    """

    hashes: U64
    sums: F64
    nonzero: I64
    mito: F64

    @property
    def mito_fraction(self) -> F64:
        """(N,) share of mitochondrial counts; 0 for a cell without counts."""
        return self.mito / np.maximum(self.sums, 1.0)


def needs_scan(config: IngestConfig) -> bool:
    """Whether cells are chosen by their counts, so that these must be read before writing."""
    return (
        config.min_genes_per_cell > 0
        or config.min_counts_per_cell > 0
        or config.max_mito_fraction < 1.0
        or config.duplicate_cells == "drop"
    )


def duplicates(hashes: U64) -> Bools:
    """(N,) true for every cell whose counts an earlier one has; cells without counts have none.

    Two different cells share a 64-bit hash with a chance of about N^2 / 4e19: 3e-6 for ten million.
    """
    order = np.argsort(hashes, kind="stable")
    ascending = hashes[order]
    again = np.zeros(len(hashes), dtype=bool)
    again[order[1:]] = ascending[1:] == ascending[:-1]
    again[hashes == 0] = False
    return again


def choose(
    config: IngestConfig,
    files: Sequence[CellFigures | None],
    primary: Sequence[Bools],
    old_hashes: U64,
) -> tuple[list[Bools], list[dict[str, int]]]:
    """Apply the rules.

    A cell is counted under the first rule that it breaks, in the order of the result's keys; a
    duplicate is one of a cell that is kept.

    Args:
        config: the ``[ingest]`` table.
        files: figures of each file's cells, None where no rule needs them.
        primary: for each file, (N,) whether a cell is no copy by its own word.
        old_hashes: content hashes of the cells of the store, in joinid order.

    Returns:
        For each file (N,) which cells are kept, and how many broke which rule.
    """
    kept, dropped = [], []
    for figures, own in zip(files, primary, strict=True):
        broken: list[tuple[str, Bools]] = []
        if config.primary_only:
            broken.append(("primary_only", ~own))
        if figures is not None:
            broken += [
                ("min_genes_per_cell", figures.nonzero < config.min_genes_per_cell),
                ("min_counts_per_cell", figures.sums < config.min_counts_per_cell),
                ("max_mito_fraction", figures.mito_fraction > config.max_mito_fraction),
            ]
        left = np.ones(len(own), dtype=bool)
        counts = {}
        for rule, breaks in broken:
            counts[rule] = int((breaks & left).sum())
            left &= ~breaks
        kept.append(left)
        dropped.append({rule: n for rule, n in counts.items() if n})
    if config.duplicate_cells == "drop":
        _drop_duplicates(files, old_hashes, kept, dropped)
    return kept, dropped


def _drop_duplicates(
    files: Sequence[CellFigures | None],
    old_hashes: U64,
    kept: list[Bools],
    dropped: list[dict[str, int]],
) -> None:
    parts = [f.hashes[k] for f, k in zip(files, kept, strict=True) if f is not None]
    again = duplicates(np.concatenate([old_hashes, *parts]))[len(old_hashes) :]
    first = 0
    for mask, counts in zip(kept, dropped, strict=True):
        rows = np.flatnonzero(mask)
        copies = again[first : first + len(rows)]
        first += len(rows)
        mask[rows[copies]] = False
        if copies.any():
            counts["duplicate_cells"] = int(copies.sum())


def refuse_idle(config: IngestConfig, mito: Bools) -> None:
    """Refuse a rule that could leave out no cell, as nothing it looks at is there.

    Args:
        config: the ``[ingest]`` table.
        mito: (V,) which genes are mitochondrial.

    Raises:
        DataError: a bound on the mitochondrial share, and no mitochondrial gene.
    """
    if config.max_mito_fraction < 1.0 and not mito.any():
        raise DataError(
            f"max_mito_fraction = {config.max_mito_fraction:g} would leave out no cell: no gene "
            "has a symbol that starts with MT- or mt-. Give the symbols in var (feature_name), or "
            "set it to 1.0 if the files leave these genes out"
        )


def refuse_nothing(config: IngestConfig, dropped: Sequence[dict[str, int]], num_cells: int) -> None:
    """Refuse an ingest that leaves out every cell of a new store.

    Raises:
        DataError: says which rules left how many out.
    """
    total: dict[str, int] = {}
    for counts in dropped:
        for rule, n in counts.items():
            total[rule] = total.get(rule, 0) + n
    rules = ", ".join(f"{n:,} by {rule} = {getattr(config, rule)}" for rule, n in total.items())
    raise DataError(f"none of the {num_cells:,} cells is left: {rules}; loosen the rules")
