"""Cells of a synthetic atlas: what each is, and its counts, from (configuration, index) alone.

Legend: N cells of a block, V genes, G distinct (donor, type) pairs of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse
from scipy.special import ndtri

from cellray.core.draw import Draw
from cellray.data.synthetic_biology import Biology
from cellray.data.synthetic_kernels import alias_table, draw_cells

__all__ = [
    "CellFacts",
    "Labels",
    "cell_facts",
    "dataset_of",
    "draw_counts",
    "find_library_size",
    "labels",
    "obs_frame",
]

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

CONTROL = "control"
_TRIAL_CELLS = 1000  # cells made to find the library size
_TRIAL_ROUNDS = 12
_TRIAL_TOLERANCE = 0.002
_GROUPS_AT_A_TIME = 32  # alias tables in memory: 12 MB at 32,000 genes


@dataclass(frozen=True)
class CellFacts:
    """What N cells are.

    Attributes:
        cells: (N,) indices, which are joinids.
        source: (N,) the cell whose content each has: another one for a duplicate, else itself.
        dataset: (N,) dataset the cell was made in, that of ``source``.
        donor: (N,) donor, counted over all datasets.
        cell_type: (N,) type.
        knockout: (N,) knocked-out regulator, or -1.
        log_library: (N,) log library size less the log of the atlas's median.
    """

    cells: I64
    source: I64
    dataset: I64
    donor: I64
    cell_type: I64
    knockout: I64
    log_library: F64


def dataset_of(atlas: Biology, cells: I64) -> I64:
    """(N,) the dataset in which each cell lies."""
    return np.searchsorted(atlas.dataset_starts, cells, side="right") - 1


def _sources(atlas: Biology, cells: I64) -> I64:
    """(N,) the cell that each repeats: itself, or one of an earlier dataset that repeats none."""
    fraction, draw = atlas.config.duplicated_fraction, Draw(atlas.config.seed)
    if not fraction:
        return cells
    before = atlas.dataset_starts[dataset_of(atlas, cells)]
    chosen = (draw.uniform("original", cells) * before).astype(np.int64)

    def repeats(some: I64) -> npt.NDArray[np.bool_]:
        inside = some >= atlas.dataset_starts[1]
        return np.asarray(inside & (draw.uniform("duplicate", some) < fraction))

    return np.where(repeats(cells) & ~repeats(chosen), chosen, cells)


def cell_facts(atlas: Biology, cells: I64) -> CellFacts:
    """What the cells of the given indices are, whatever block they are made in.

    Args:
        atlas: the biology.
        cells: (N,) indices, 0 .. num_cells-1, in any order.
    """
    config, draw = atlas.config, Draw(atlas.config.seed)
    source = _sources(atlas, cells)
    dataset = dataset_of(atlas, source)
    local = (draw.uniform("donor", source) * config.donors_per_dataset).astype(np.int64)
    cumulative = np.cumsum(atlas.dataset_mix, axis=1)
    cumulative[:, -1] = 1.0
    wanted = draw.uniform("type", source)
    kind = np.empty(len(cells), dtype=np.int64)
    for one in np.unique(dataset):
        inside = dataset == one
        kind[inside] = np.searchsorted(cumulative[one], wanted[inside], side="right")
    perturbed = draw.uniform("perturbed", source) < config.perturbed_fraction
    which = (draw.uniform("knockout", source) * config.num_knockouts).astype(np.int64)
    knockout = np.where(perturbed & (config.num_knockouts > 0), which, -1)
    normal = ndtri(np.clip(draw.uniform("library", source), 1e-12, 1 - 1e-12))
    return CellFacts(
        cells=cells,
        source=source,
        dataset=dataset,
        donor=dataset * config.donors_per_dataset + local,
        cell_type=kind,
        knockout=knockout,
        log_library=atlas.dataset_log_library[dataset] + config.library_size_sigma * normal,
    )


def _draw(
    atlas: Biology, facts: CellFacts, library_size: float, expected: int
) -> sparse.csr_matrix:
    config = atlas.config
    types = config.num_types
    groups, group = np.unique(facts.donor * types + facts.cell_type, return_inverse=True)
    donors, kinds = groups // types, groups % types
    dynamic, pointers, sources, weights = atlas.dynamic
    shape = (len(groups), config.num_genes)
    rates = np.empty(shape, dtype=np.float32)
    threshold, other = np.empty(shape, dtype=np.uint32), np.empty(shape, dtype=np.int32)
    mass = np.empty(len(groups))
    for donor in np.unique(donors):
        rates[donors == donor] = atlas.rates(int(donor), kinds[donors == donor])
    for row in range(len(groups)):
        static = rates[row].astype(np.float64)
        static[dynamic] = 0.0
        mass[row] = static.sum()
        alias_table(static, threshold[row], other[row])
    means = np.concatenate([atlas.regulator_activity, atlas.pathway_activity], axis=1)[kinds]
    diseased = atlas.donor_diseased()[facts.donor]
    indptr, genes, counts = draw_cells(
        Draw(config.seed).cell_keys("counts", facts.source),
        group.astype(np.int64),
        library_size * np.exp(facts.log_library),
        facts.knockout,
        np.where(diseased, config.disease_shift, 0.0),
        rates,
        threshold,
        other,
        mass,
        np.ascontiguousarray(means),
        atlas.spreads,
        dynamic,
        pointers,
        sources,
        weights,
        config.dispersion,
        config.num_regulators,
        expected,
    )
    shape = (len(facts.cells), config.num_genes)
    return sparse.csr_matrix((counts, genes, indptr), shape=shape)


def draw_counts(atlas: Biology, facts: CellFacts, library_size: float) -> sparse.csr_matrix:
    """The counts of N cells: (N, V), genes ascending within a cell, no zeros.

    Args:
        atlas: the biology.
        facts: the cells, from :func:`cell_facts`.
        library_size: median library size of the atlas.
    """
    config = atlas.config
    # cells of one group after another, so that its tables stay in the cache
    pairs = facts.donor * config.num_types + facts.cell_type
    order = np.argsort(pairs, kind="stable")
    starts = np.flatnonzero(np.diff(pairs[order], prepend=-1))[::_GROUPS_AT_A_TIME]
    mean = min(config.mean_genes_per_cell, 0.8 * config.num_genes)
    parts = []
    for first, last in zip(starts, [*starts[1:], len(order)], strict=True):
        some = _take(facts, order[first:last])
        parts.append(_draw(atlas, some, library_size, int((last - first) * mean * 1.1)))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return sparse.vstack(parts, format="csr")[place]


def _take(facts: CellFacts, rows: I64) -> CellFacts:
    return CellFacts(
        cells=facts.cells[rows],
        source=facts.source[rows],
        dataset=facts.dataset[rows],
        donor=facts.donor[rows],
        cell_type=facts.cell_type[rows],
        knockout=facts.knockout[rows],
        log_library=facts.log_library[rows],
    )


def find_library_size(atlas: Biology) -> float:
    """The median library size: the one asked for, or one that gives the wanted genes per cell.

    Up to a thousand cells, spread evenly over the atlas, are made at a time, always with the same
    random numbers, until their mean of detected genes is within 0.2 % of the wanted one.
    """
    config = atlas.config
    if config.library_size:
        return config.library_size
    count = min(config.num_cells, _TRIAL_CELLS)
    cells = np.unique(np.linspace(0, config.num_cells - 1, count).astype(np.int64))
    facts, wanted = cell_facts(atlas, cells), config.mean_genes_per_cell
    low, high = 0.0, np.inf
    size = wanted * 3.0
    for _ in range(_TRIAL_ROUNDS):
        found = draw_counts(atlas, facts, size).nnz / len(cells)
        if abs(found / wanted - 1) < _TRIAL_TOLERANCE:
            break
        low, high = (size, high) if found < wanted else (low, size)
        # genes grow slower than counts; stay between what is known
        size *= (wanted / max(found, 1e-3)) ** 1.5
        if not low < size < high:
            size = np.sqrt(max(low, 1e-3) * high) if np.isfinite(high) else low * 2
    return float(size)


@dataclass(frozen=True)
class Labels:
    """The words of the atlas.

    Attributes:
        datasets: name of each dataset.
        donors: of each donor.
        types: of each cell type.
        lineages: of each lineage.
        tissues: of each tissue.
        assays: of each dataset's assay.
        pathways: of each pathway.
        knockouts: what obs ``perturbation`` says of each knock-out.
    """

    datasets: list[str]
    donors: list[str]
    types: list[str]
    lineages: list[str]
    tissues: list[str]
    assays: list[str]
    pathways: list[str]
    knockouts: list[str]


def labels(atlas: Biology) -> Labels:
    """The names that obs and the truth use."""
    config = atlas.config
    per = config.donors_per_dataset
    return Labels(
        datasets=[f"dataset_{d:03d}" for d in range(config.num_datasets)],
        donors=[f"donor_{d:03d}_{i}" for d in range(config.num_datasets) for i in range(per)],
        types=[f"type_{t:03d} of lineage_{i:02d}" for t, i in enumerate(atlas.lineage_of)],
        lineages=[f"lineage_{i:02d}" for i in range(config.num_lineages)],
        tissues=[f"tissue_{i:02d}" for i in range(config.num_tissues)],
        assays=["10x 3' v2", "10x 3' v3", "10x 5' v1"],
        pathways=[f"pathway_{i:03d}" for i in range(config.num_pathways)],
        knockouts=[f"KO {atlas.gene_names[g]}" for g in atlas.regulators[: config.num_knockouts]],
    )


def _category(codes: I64, words: list[str]) -> pd.Categorical:
    return pd.Categorical.from_codes(codes.astype(np.int32), categories=words)


def obs_frame(atlas: Biology, facts: CellFacts) -> pd.DataFrame:
    """What obs says of N cells, beside what is counted: string columns are categorical."""
    words = labels(atlas)
    batch = dataset_of(atlas, facts.cells)
    assay = facts.dataset % len(words.assays)
    columns: Mapping[str, pd.Categorical | npt.NDArray[np.generic]] = {
        "cell_type": _category(facts.cell_type, words.types),
        "lineage": _category(atlas.lineage_of[facts.cell_type], words.lineages),
        "donor_id": _category(facts.donor, words.donors),
        "tissue": _category(atlas.dataset_tissue[facts.dataset], words.tissues),
        "tissue_general": _category(atlas.dataset_tissue[facts.dataset], words.tissues),
        "batch": _category(batch, words.datasets),
        "assay": _category(assay, words.assays),
        "sex": _category(atlas.donor_female()[facts.donor].astype(int), ["male", "female"]),
        "disease": _category(
            atlas.donor_diseased()[facts.donor].astype(int), ["normal", "synthetic disease"]
        ),
        "perturbation": _category(facts.knockout + 1, [CONTROL, *words.knockouts]),
        "is_primary_data": facts.source == facts.cells,
    }
    return pd.DataFrame(columns)
