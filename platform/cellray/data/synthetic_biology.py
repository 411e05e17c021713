"""The biology of a synthetic atlas: genes and their roles, types, donors, pathways, regulation.

A pure function of the configuration. The rate of gene g in cell c, as a share of its library size:

    log rate = log base_g                              Zipf-like over genes
             + type_log_fold[type, g]                  markers, and a little of every gene
             + batch_log_fold[dataset, g] + donor      normal over genes
             - log(sum over genes)                     so that every group of cells sums to 1
             + sum over regulators r of g: weight (activity_r(c) - 1)
             + sum over pathways p of g: loading level_p(c)

and a regulator's own rate is multiplied by its activity, which is normal about the type's mean
and not below 0 (a lognormal one would give its targets an infinite mean). A knock-out sets the
activity to 0: the regulator's counts vanish, and each target's log rate falls by weight x activity.

Legend: V genes, T types, D datasets, K regulators, P pathways, M tissues.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cellray.data.genes import gene_table
from cellray.data.synthetic_config import SynthesizeConfig

__all__ = ["Biology", "atlas_genes", "biology"]

F64 = npt.NDArray[np.float64]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

_MITOCHONDRIAL = re.compile(r"^MT-(ND|CO|CYB|ATP)")
# symbols of genes that are, for the most part, not protein-coding
_NOT_CODING = re.compile(
    r"^(LINC|MIR\d|SNOR|RNU|RN7|RNA5|Y_RNA|MT-|IG[HKL][VDJ]|TR[ABDG][VDJ]|LOC\d)|[-.]|\dP\d*$"
)
_SHIFT = 10.0  # of the Zipf law: the most frequent gene has about 1 %, not 9 %
_MITOCHONDRIAL_SHARE = 0.06
_FIRST_RANK = 20  # genes with a role are not among the most frequent
_REGULATOR_SPREAD = 0.5  # of a regulator's activity over cells of a type, relative to its mean
_PATHWAY_SPREAD = 0.5  # of a pathway's level over cells of a type
_OWN_TYPES = 0.7  # share of a tissue's cells that are of the types it prefers
_ROLES = ("housekeeping", "mitochondrial", "regulator", "target", "pathway", "lineage marker",
          "type marker")  # fmt: skip


@lru_cache(maxsize=2)
def _gene_order() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Human Ensembl ids: mitochondrial coding, likely coding, and all others."""
    symbols = gene_table("human").symbols
    chromosome = [g for g, s in symbols.items() if _MITOCHONDRIAL.match(s)]
    coding = [g for g, s in symbols.items() if s and not _NOT_CODING.search(s)]
    known = {*chromosome, *coding}
    others = [g for g, s in symbols.items() if s and g not in known]
    return tuple(chromosome), tuple(coding), tuple(others)


def atlas_genes(num_genes: int, num_mitochondrial: int) -> tuple[list[str], list[str]]:
    """Ensembl ids and symbols of the atlas's genes, the same for every seed.

    Real human ids, as long as there are any with a symbol: likely protein-coding ones first; then
    made-up ones, ``ENSG9...``, that cannot be taken for others.

    Args:
        num_genes: V.
        num_mitochondrial: how many of them are mitochondrial; they come first.
    """
    symbols = gene_table("human").symbols
    chromosome, coding, others = _gene_order()
    ids = [*chromosome[:num_mitochondrial], *coding, *others][:num_genes]
    made_up = [f"ENSG9{i:010d}" for i in range(num_genes - len(ids))]
    names = [symbols[g] for g in ids] + [f"SYN{i + 1}" for i in range(len(made_up))]
    return ids + made_up, names


@dataclass(frozen=True)
class Biology:
    """The planted truth as arrays; get one from :func:`biology`.

    Attributes:
        config: what it follows from.
        gene_ids: V Ensembl ids.
        gene_names: V symbols.
        roles: (V,) what each gene is for, e.g. ``"regulator"``.
        base: (V,) shares of the library size before all effects; sum to 1.
        lineage_of: (T,) lineage of each type.
        type_log_fold: (T, V).
        lineage_markers: lineage -> gene rows.
        type_markers: type -> gene rows.
        regulators: (K,) gene rows.
        regulator_activity: (T, K) mean activity.
        edge_regulator: (E,) regulator of each edge, 0 .. K-1.
        edge_target: (E,) gene row.
        edge_weight: (E,) signed.
        pathway_of: pathway -> gene rows.
        pathway_loading: pathway -> loading of each of them.
        pathway_activity: (T, P) mean level.
        dataset_starts: (D+1,) first cell of each dataset.
        dataset_tissue: (D,) tissue of each.
        dataset_log_library: (D,) shift of the log library size.
        dataset_mix: (D, T) share of each type.
    """

    config: SynthesizeConfig
    gene_ids: Sequence[str]
    gene_names: Sequence[str]
    roles: npt.NDArray[np.str_]
    base: F64
    lineage_of: I64
    type_log_fold: F32
    lineage_markers: Sequence[I64]
    type_markers: Sequence[I64]
    regulators: I64
    regulator_activity: F64
    edge_regulator: I64
    edge_target: I64
    edge_weight: F64
    pathway_of: Sequence[I64]
    pathway_loading: Sequence[F64]
    pathway_activity: F64
    dataset_starts: I64
    dataset_tissue: I64
    dataset_log_library: F64
    dataset_mix: F64

    @property
    def spreads(self) -> F64:
        """(2,) spread over cells: of a regulator's relative activity, of a pathway's level."""
        return np.array([_REGULATOR_SPREAD, _PATHWAY_SPREAD])

    def batch_log_fold(self, dataset: int) -> F32:
        """(V,) a dataset's effect on the log rate of each gene."""
        random = np.random.default_rng([self.config.seed, 101, dataset])
        normal = random.standard_normal(len(self.gene_ids), dtype=np.float32)
        return normal * np.float32(self.config.batch_strength)

    def donor_log_fold(self, donor: int) -> F32:
        """(V,) a donor's effect on the log rate of each gene."""
        random = np.random.default_rng([self.config.seed, 102, donor])
        normal = random.standard_normal(len(self.gene_ids), dtype=np.float32)
        return normal * np.float32(self.config.donor_strength)

    def rates(self, donor: int, cell_types: I64) -> F32:
        """(G, V) shares of the library size in cells of a donor, by type; each row sums to 1."""
        dataset = donor // self.config.donors_per_dataset
        effect = self.batch_log_fold(dataset) + self.donor_log_fold(donor)
        rates = self.base * np.exp(effect + self.type_log_fold[cell_types])
        return np.asarray(rates / rates.sum(axis=1, keepdims=True), dtype=np.float32)

    def donor_diseased(self) -> npt.NDArray[np.bool_]:
        """(donors,) who is diseased."""
        count = self.config.num_datasets * self.config.donors_per_dataset
        random = np.random.default_rng([self.config.seed, 103])
        return random.random(count) < self.config.diseased_fraction

    def donor_female(self) -> npt.NDArray[np.bool_]:
        """(donors,) who is female."""
        count = self.config.num_datasets * self.config.donors_per_dataset
        return np.random.default_rng([self.config.seed, 104]).random(count) < 0.5

    @property
    def dynamic(self) -> tuple[I64, I64, I64, F64]:
        """Genes whose rate differs from cell to cell, and on what it depends.

        Returns:
            gene rows ascending (G,), offsets (G+1,), states (L,), weights (L,): states 0 .. K-1
            are activities less 1, K .. 2K-1 their logarithms, 2K .. 2K+P-1 levels of pathways.
        """
        num_regulators = len(self.regulators)
        genes = [self.edge_target, self.regulators, *self.pathway_of]
        states = [
            self.edge_regulator,
            num_regulators + np.arange(num_regulators),
            *[np.full(len(g), 2 * num_regulators + p) for p, g in enumerate(self.pathway_of)],
        ]
        weights = [self.edge_weight, np.ones(num_regulators), *self.pathway_loading]
        gene, state = np.concatenate(genes), np.concatenate(states).astype(np.int64)
        weight = np.concatenate(weights).astype(np.float64)
        order = np.lexsort((state, gene))
        rows, counts = np.unique(gene, return_counts=True)
        pointers = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return rows.astype(np.int64), pointers, state[order], weight[order]


@dataclass(frozen=True)
class _Roles:
    """Which genes have a role, and how frequent every gene is."""

    base: F64
    names: npt.NDArray[np.str_]
    regulators: I64
    targets: I64
    pathways: list[I64]
    lineages: list[I64]
    types: list[I64]


def _split(genes: I64, parts: int, size: int) -> list[I64]:
    return [np.sort(genes[i * size : (i + 1) * size]) for i in range(parts)]


def _roles(config: SynthesizeConfig, random: np.random.Generator) -> _Roles:
    num_mitochondrial, num_special = config.num_mitochondrial, config.num_special
    nuclear = config.num_genes - num_mitochondrial
    frequency = (np.arange(nuclear) + _SHIFT) ** -config.zipf_exponent
    # Genes with a role get every second rank behind the first few, regulators the first of them:
    # what is planted must be seen in the counts.
    first = min(_FIRST_RANK, nuclear - num_special)
    pool = np.arange(first, min(nuclear, first + 2 * num_special))
    early = pool[: max(config.num_regulators, min(len(pool), 6 * config.num_regulators))]
    of_regulators = random.permutation(early)[: config.num_regulators]
    rest = random.permutation(np.setdiff1d(pool, of_regulators))
    gene_of_rank = num_mitochondrial + random.permutation(nuclear)
    special = gene_of_rank[np.concatenate([of_regulators, rest])]
    base = np.empty(config.num_genes)
    base[gene_of_rank] = frequency / frequency.sum() * (1 - _MITOCHONDRIAL_SHARE)
    if num_mitochondrial:
        base[:num_mitochondrial] = random.dirichlet(np.full(num_mitochondrial, 5.0))
        base[:num_mitochondrial] *= _MITOCHONDRIAL_SHARE
    sizes = [
        config.num_regulators,
        config.num_targets,
        config.num_pathways * config.genes_per_pathway,
        config.num_lineages * config.markers_per_lineage,
        config.num_types * config.markers_per_type,
    ]
    parts = np.split(special[:num_special], np.cumsum(sizes)[:-1])
    names = np.full(config.num_genes, _ROLES[0], dtype=object)
    names[:num_mitochondrial] = _ROLES[1]
    for role, genes in zip(_ROLES[2:], parts, strict=True):
        names[genes] = role
    return _Roles(
        base=base / base.sum(),
        names=names.astype(np.str_),
        regulators=np.sort(parts[0]),
        targets=np.sort(parts[1]),
        pathways=_split(parts[2], config.num_pathways, config.genes_per_pathway),
        lineages=_split(parts[3], config.num_lineages, config.markers_per_lineage),
        types=_split(parts[4], config.num_types, config.markers_per_type),
    )


def _type_effects(config: SynthesizeConfig, roles: _Roles, random: np.random.Generator) -> F32:
    shape = (config.num_types, config.num_genes)
    effects = random.standard_normal(shape, dtype=np.float32) * np.float32(config.type_strength)
    effects[:, [*roles.regulators, *roles.targets]] = 0  # types differ there by activity alone
    for lineage, genes in enumerate(roles.lineages):
        effects[lineage :: config.num_lineages, genes] += np.float32(config.marker_log_fold)
    for kind, genes in enumerate(roles.types):
        effects[kind, genes] += np.float32(config.marker_log_fold)
    return effects


def _edges(
    config: SynthesizeConfig, targets: I64, random: np.random.Generator
) -> tuple[I64, I64, F64]:
    size = config.targets_per_regulator if config.num_regulators else 0
    chosen = [
        np.sort(random.choice(targets, size=size, replace=False))
        for _ in range(config.num_regulators)
    ]
    regulator = np.repeat(np.arange(config.num_regulators), size)
    weight = config.edge_weight * random.uniform(0.6, 1.4, size=len(regulator))
    weight *= np.where(random.random(len(regulator)) < config.repressing_fraction, -1.0, 1.0)
    target = np.concatenate([np.zeros(0, np.int64), *chosen]).astype(np.int64)
    return regulator.astype(np.int64), target, weight


def _mixes(config: SynthesizeConfig, tissue: I64, random: np.random.Generator) -> F64:
    """(D, T) types of each dataset: those its tissue prefers, unevenly, and a few of the others."""
    num_types = config.num_types
    preferred = random.dirichlet(np.full(num_types, 0.4), size=config.num_tissues)
    even = np.full(num_types, 1 / num_types)
    mixes = np.empty((config.num_datasets, num_types))
    for dataset in range(config.num_datasets):
        mean = _OWN_TYPES * preferred[tissue[dataset]] + (1 - _OWN_TYPES) * even
        mixes[dataset] = random.dirichlet(20 * mean + 0.05)
    return mixes


def _dataset_starts(config: SynthesizeConfig, random: np.random.Generator) -> I64:
    """(D+1,) cells of each dataset, of uneven sizes, at least one."""
    share = random.dirichlet(np.full(config.num_datasets, 3.0))
    spare = config.num_cells - config.num_datasets
    ends = np.floor(np.cumsum(share) * spare + 0.5).astype(np.int64)
    ends[-1] = spare
    return np.concatenate([[0], ends + np.arange(1, config.num_datasets + 1)])


def biology(config: SynthesizeConfig) -> Biology:
    """The planted truth that follows from a configuration."""
    # each part has a generator of its own, so that a key of one does not change the others
    random = [np.random.default_rng([config.seed, stream]) for stream in range(6)]
    roles = _roles(config, random[0])
    ids, names = atlas_genes(config.num_genes, config.num_mitochondrial)
    regulator, target, weight = _edges(config, roles.targets, random[2])
    types = config.num_types
    tissue = random[4].permutation(np.arange(config.num_datasets) % config.num_tissues)
    return Biology(
        config=config,
        gene_ids=ids,
        gene_names=names,
        roles=roles.names,
        base=roles.base,
        lineage_of=np.arange(types) % config.num_lineages,
        type_log_fold=_type_effects(config, roles, random[1]),
        lineage_markers=roles.lineages,
        type_markers=roles.types,
        regulators=roles.regulators,
        regulator_activity=random[2].uniform(0.5, 1.5, size=(types, config.num_regulators)),
        edge_regulator=regulator,
        edge_target=target,
        edge_weight=weight,
        pathway_of=roles.pathways,
        pathway_loading=[random[3].uniform(0.5, 1.0, size=len(g)) for g in roles.pathways],
        pathway_activity=random[3].normal(0, 0.7, size=(types, config.num_pathways)),
        dataset_starts=_dataset_starts(config, random[4]),
        dataset_tissue=tissue,
        dataset_log_library=random[4].normal(0, config.batch_library_strength, config.num_datasets),
        dataset_mix=_mixes(config, tissue, random[5]),
    )
