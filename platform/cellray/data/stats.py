"""Figures of a selection of cells: non-zero medians, library sizes, what a vocabulary covers.

Legend: N cells, V genes of the store, G genes of the vocabulary, Z non-zero counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellray.core.blocks import CellBlock, row_ids
from cellray.core.errors import DataError
from cellray.data import schema
from cellray.data.stores import AnyStore
from cellray.data.vocab import Vocab

__all__ = [
    "MIN_COUNT_FRACTION",
    "TARGET_SUM",
    "VocabCoverage",
    "check_coverage",
    "coverage",
    "library_size_quantiles",
    "nonzero_medians",
]

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]

TARGET_SUM = 10_000.0  # Geneformer's size factor (doi:10.1038/s41586-023-06139-9)
MIN_COUNT_FRACTION = 0.60  # a smaller share of matched counts is refused or warned of
UNSEEN_MEDIAN = 1.0
_MOSTLY_WHOLE = 0.5
_LARGEST_LOG = 30.0  # log1p of any count there is, and of any scaling in use, stays below


def _blocks(
    store: AnyStore, joinids: I64, gene_map: I32, cells_per_block: int
) -> Iterator[CellBlock]:
    ascending = np.sort(np.asarray(joinids, dtype=np.int64))
    for first in range(0, len(ascending), cells_per_block):
        yield store.read_block(ascending[first : first + cells_per_block], gene_map)


def _keys(block: CellBlock) -> npt.NDArray[np.uint64]:
    """(Z,) sortable keys: gene in the high half, bits of the normalised value in the low half."""
    size = block.library_sizes.astype(np.float64)[row_ids(block.indptr)]
    values = (block.counts / size * TARGET_SUM).astype(np.float32)
    # the bits of positive floats sort as the floats do
    low = values.view(np.uint32).astype(np.uint64)
    return (block.genes.astype(np.uint64) << np.uint64(32)) | low


def nonzero_medians(
    store: AnyStore,
    joinids: I64,
    gene_map: I32,
    num_genes: int,
    *,
    cells_per_block: int = 4096,
) -> F32:
    """The exact median of each gene's normalised counts over the cells that express it.

    Normalised: count / library size x 10,000, library size over all genes of the store. Needs 8
    bytes of memory for each non-zero count of the cells (about 3 GB for 200,000 cells of 1,850
    detected genes): give it a sample of a larger store.

    Args:
        store: where the cells are.
        joinids: (N,) the cells, in any order; the result does not depend on it.
        gene_map: (V,) vocabulary index of each gene of the store, -1 where there is none.
        num_genes: G.
        cells_per_block: cells read at a time.

    Returns:
        (G,) float32; 1.0 for a gene that no cell expresses, which ranks it by its plain
        normalised count if it is met later.
    """
    keys = [_keys(block) for block in _blocks(store, joinids, gene_map, cells_per_block)]
    merged = np.concatenate(keys) if keys else np.zeros(0, dtype=np.uint64)
    del keys
    merged.sort()
    bounds = np.searchsorted(merged, np.arange(num_genes + 1, dtype=np.uint64) << np.uint64(32))
    first, count = bounds[:-1], np.diff(bounds)
    values = (merged & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.float32)
    medians = np.full(num_genes, UNSEEN_MEDIAN, dtype=np.float32)
    seen = count > 0
    low = values[(first + (count - 1) // 2)[seen]].astype(np.float64)
    high = values[(first + count // 2)[seen]].astype(np.float64)
    medians[seen] = (low + high) / 2
    return medians


def library_size_quantiles(
    store: AnyStore,
    joinids: I64,
    *,
    quantiles: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95),
    cells_per_block: int = 4096,
) -> npt.NDArray[np.float64]:
    """Quantiles of the total counts of cells, over all genes of the store.

    Read from obs ``raw_sum`` where the store has it (ours and Census), else from X.

    Args:
        store: where the cells are.
        joinids: (N,) the cells.
        quantiles: Q values in 0..1, interpolated linearly.
        cells_per_block: cells read at a time.

    Returns:
        (Q,) float64.

    Raises:
        DataError: there are no cells.
    """
    if len(joinids) == 0:
        raise DataError("library sizes of no cells: the selection is empty")
    column = schema.raw_sum(store.measurement)
    if store.has_obs(column):
        sizes = store.obs([column]).set_index(schema.JOINID)[column].loc[joinids]
        return np.asarray(np.quantile(sizes.to_numpy(dtype=np.float64), quantiles))
    nothing = np.full(store.num_genes, -1, dtype=np.int32)
    parts = [b.library_sizes for b in _blocks(store, joinids, nothing, cells_per_block)]
    return np.asarray(np.quantile(np.concatenate(parts).astype(np.float64), quantiles))


@dataclass(frozen=True)
class VocabCoverage:
    """How much of a store a vocabulary knows.

    Attributes:
        genes_in_store: V.
        genes_matched: genes of the store that the vocabulary has.
        count_fraction: share of all counts that fall on them, 0..1, over the cells looked at.
        cells_sampled: how many cells were looked at.
        example_ids: a few gene ids of the store, for messages.
        genes_per_cell: (cells_sampled,) vocabulary genes that each cell looked at expresses.
        whole_fraction: share of the values on vocabulary genes that are whole numbers.
        largest: the largest of them.
    """

    genes_in_store: int
    genes_matched: int
    count_fraction: float
    cells_sampled: int
    example_ids: tuple[str, ...] = ()
    genes_per_cell: tuple[int, ...] = ()
    whole_fraction: float = 1.0
    largest: float = float("inf")

    def longer_than(self, max_genes: int, what: str, *, every: int = 0) -> str:
        """How many of the cells looked at a tokenizer cuts, and what becomes of them; "" if none.

        Args:
            max_genes: genes the tokenizer keeps of a cell.
            what: what it does with longer cells.
            every: genes that it gives each cell, zeros included; 0 for those a cell expresses.
        """
        if every > max_genes:
            return (
                f"cells have {every:,} genes, zeros included, and tokenizer.max_tokens leaves room "
                f"for {max_genes:,}: {what}"
            )
        cut = sum(genes > max_genes for genes in self.genes_per_cell)
        if not cut:
            return ""
        return (
            f"{cut:,} of {self.cells_sampled:,} cells looked at express more than {max_genes:,} "
            f"genes, the most that tokenizer.max_tokens leaves room for: {what}"
        )


def coverage(
    store: AnyStore,
    vocab: Vocab,
    *,
    joinids: I64 | None = None,
    max_cells: int = 4096,
    cells_per_block: int = 4096,
) -> VocabCoverage:
    """How many genes and counts of a store a vocabulary covers.

    Genes are counted over all of var; counts over a sample of at most ``max_cells`` cells, spread
    evenly over the selection in runs of 64.

    Args:
        store: the store.
        vocab: the vocabulary.
        joinids: (N,) the selection; None for all cells.
        max_cells: cells looked at.
        cells_per_block: cells read at a time.
    """
    var = store.var()
    gene_map = vocab.match(var["feature_id"].tolist(), var["feature_name"].tolist())
    cells = np.arange(store.num_cells, dtype=np.int64) if joinids is None else np.sort(joinids)
    sample = cells[_spread(len(cells), max_cells)]
    matched = total = largest = 0.0
    values = whole = 0
    genes: list[int] = []
    for block in _blocks(store, sample, gene_map, cells_per_block):
        genes += np.diff(block.indptr).tolist()
        matched += float(block.counts.sum(dtype=np.float64))
        values += len(block.counts)
        whole += int((block.counts == np.floor(block.counts)).sum())
        largest = max(largest, float(block.counts.max(initial=0.0)))
        total += float(block.library_sizes.sum(dtype=np.float64))
    return VocabCoverage(
        genes_in_store=len(var),
        genes_matched=int((gene_map >= 0).sum()),
        count_fraction=matched / total if total else 0.0,
        cells_sampled=len(sample),
        example_ids=tuple(var["feature_id"].iloc[:3]),
        genes_per_cell=tuple(genes),
        whole_fraction=whole / values if values else 1.0,
        largest=largest,
    )


def _spread(num_cells: int, max_cells: int, run: int = 64) -> I64:
    """At most ``max_cells`` positions of ``num_cells``: runs of neighbours, evenly spaced."""
    if num_cells <= max_cells:
        return np.arange(num_cells, dtype=np.int64)
    run = min(run, max_cells)
    starts = np.linspace(0, num_cells - run, max_cells // run).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(run))


def check_coverage(
    covered: VocabCoverage, vocab: Vocab, *, refuse: bool = False, chosen: bool = False
) -> list[str]:
    """Refuse a vocabulary that shares no gene with the data; warn if it loses many counts.

    Values that are not counts are refused too: mostly fractions, and none as large as counts get.
    (Estimated counts of full-length protocols are fractions as well, but large ones.)

    Args:
        covered: from :func:`coverage`.
        vocab: the vocabulary.
        refuse: refuse it also if it loses many counts.
        chosen: it is a choice of variable genes, which leaves counts out on purpose: refused is
            then a store that lacks more than 40 % of its genes.

    Returns:
        Warnings, each a sentence; none if at least 60 % of the counts are covered.

    Raises:
        DataError: no gene in common; with ``refuse``, less than 60 % of the counts covered;
            or values that look like logarithms or shares.
    """
    if covered.whole_fraction < _MOSTLY_WHOLE and covered.largest < _LARGEST_LOG:
        raise DataError(
            f"models need raw counts, but {covered.whole_fraction:.1%} of the values are whole "
            f"numbers and the largest is {covered.largest:.4g}: they look like logarithms or "
            "shares; set data.layer to the layer with raw counts, or ingest the raw file"
        )
    if covered.genes_matched == 0 or covered.count_fraction == 0.0:
        raise DataError(
            "the data and the vocabulary have no gene in common that the selected cells express: "
            "the store's genes are like "
            f"{', '.join(covered.example_ids)}; the vocabulary's like "
            f"{', '.join(vocab.gene_ids[:3])} (symbols {', '.join(vocab.symbols[:3])}). Is it "
            "another organism, or another kind of id? Ingest maps symbols to Ensembl ids if "
            "ingest.organism is right"
        )
    if covered.count_fraction >= MIN_COUNT_FRACTION:
        return []
    told = (
        f"the vocabulary covers only {covered.count_fraction:.1%} of the counts "
        f"({covered.genes_matched:,} of {covered.genes_in_store:,} genes; "
        f"{covered.cells_sampled:,} cells looked at): "
        f"{1 - covered.count_fraction:.1%} are lost to the model"
    )
    there = covered.genes_matched / max(len(vocab.gene_ids), 1)
    if refuse and chosen and there < MIN_COUNT_FRACTION:
        raise DataError(
            f"the store has only {covered.genes_matched:,} of the {len(vocab.gene_ids):,} genes "
            f"that the model was trained on; {told}. At least {MIN_COUNT_FRACTION:.0%} of its "
            "genes are asked for: ingest the store with the right ingest.organism, choose a model "
            "of these genes, or set data.allow_gene_loss = true"
        )
    if refuse and not chosen:
        raise DataError(
            f"{told}. At least {MIN_COUNT_FRACTION:.0%} are asked for: ingest the store with the "
            "right ingest.organism, so that symbols and versions of ids are mapped, choose a model "
            "of these genes, or set data.allow_gene_loss = true"
        )
    return [told]
