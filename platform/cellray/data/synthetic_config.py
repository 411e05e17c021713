"""What a synthetic atlas looks like: the keys of ``cellray synthesize``."""

from __future__ import annotations

from pydantic import Field, model_validator

from cellray.core.section import MAX_SEED, Section

__all__ = ["SynthesizeConfig"]

_MITOCHONDRIAL = 13  # protein-coding genes of the mitochondrial genome


class SynthesizeConfig(Section):
    """A synthetic single-cell atlas with known biology.

    All ``*_log_fold`` and ``*_strength`` keys are natural logarithms of ratios of rates.

    Attributes:
        uri: the store to make, a local folder; only :func:`synthesize_anndata` does without.
        overwrite: replace a store that is at ``uri``; false refuses.
        seed: everything random follows from it.
        num_cells: cells N.
        num_genes: genes V.
        mean_genes_per_cell: wanted mean of detected genes; the median library size is found from
            it by making a thousand cells. The default is the mean of the CELLxGENE Census.
        library_size: median counts of a cell; above 0 it is taken instead of
            ``mean_genes_per_cell``.
        library_size_sigma: spread of library sizes, of the logarithm.
        zipf_exponent: the k-th most frequent gene's rate falls as ``(k + 10) ** -zipf_exponent``.
        dispersion: phi of the counts' variance ``mean + phi mean^2``; 0 is Poisson.
        num_lineages: cell types belong to so many lineages.
        num_types: cell types.
        markers_per_lineage: genes that a lineage's types share.
        markers_per_type: genes of one type alone.
        marker_log_fold: by how much a marker is higher where it marks.
        type_strength: spread over all genes of what else tells types apart.
        num_datasets: technical batches; cells lie dataset after dataset.
        donors_per_dataset: donors of each; a donor is in one dataset.
        num_tissues: tissues; a dataset has one, and a tissue its own mix of types.
        batch_strength: spread over genes of a dataset's effect.
        batch_library_strength: spread over datasets of the library size.
        donor_strength: spread over genes of a donor's effect.
        diseased_fraction: of donors; their first pathway is raised by ``disease_shift``.
        disease_shift: see there.
        num_regulators: genes that regulate others.
        targets_per_regulator: edges from each; several regulators may share a target.
        edge_weight: mean size of an edge's weight, which scales a regulator's activity into the
            log-rate of its target.
        repressing_fraction: of edges, those with a negative weight.
        num_pathways: gene sets that rise and fall together.
        genes_per_pathway: members of each.
        num_knockouts: regulators that are knocked out in some cells.
        perturbed_fraction: of cells, those with a knock-out.
        duplicated_fraction: chance of a cell behind the first dataset to repeat one of an earlier
            dataset, counts, donor and all, as happens in the Census; obs ``is_primary_data`` is
            then false. A cell that would repeat a repeated one is made anew.
        cells_per_block: cells made and written at a time, one fragment of X each.
        workers: Ray tasks at a time; 0 takes all CPUs, 1 works in this process without Ray.
            On several machines ``uri`` has to be on a file system that they share.
    """

    uri: str = ""
    overwrite: bool = False
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    num_cells: int = Field(default=100_000, ge=1)
    num_genes: int = Field(default=32_000, ge=50)
    mean_genes_per_cell: float = Field(default=1845.0, gt=0)
    library_size: float = Field(default=0.0, ge=0, le=1e7)
    library_size_sigma: float = Field(default=0.5, ge=0, le=3)
    zipf_exponent: float = Field(default=1.0, ge=0, le=3)
    dispersion: float = Field(default=0.25, ge=0, le=100)
    num_lineages: int = Field(default=6, ge=1)
    num_types: int = Field(default=24, ge=1)
    markers_per_lineage: int = Field(default=20, ge=0)
    markers_per_type: int = Field(default=20, ge=0)
    marker_log_fold: float = Field(default=2.5, ge=0, le=10)
    type_strength: float = Field(default=0.2, ge=0, le=3)
    num_datasets: int = Field(default=20, ge=1)
    donors_per_dataset: int = Field(default=4, ge=1)
    num_tissues: int = Field(default=5, ge=1)
    batch_strength: float = Field(default=0.2, ge=0, le=3)
    batch_library_strength: float = Field(default=0.2, ge=0, le=3)
    donor_strength: float = Field(default=0.1, ge=0, le=3)
    diseased_fraction: float = Field(default=0.25, ge=0, le=1)
    disease_shift: float = Field(default=1.0, ge=-5, le=5)
    num_regulators: int = Field(default=40, ge=0)
    targets_per_regulator: int = Field(default=20, ge=0)
    edge_weight: float = Field(default=0.8, ge=0, le=3)
    repressing_fraction: float = Field(default=0.3, ge=0, le=1)
    num_pathways: int = Field(default=20, ge=0)
    genes_per_pathway: int = Field(default=20, ge=0)
    num_knockouts: int = Field(default=10, ge=0)
    perturbed_fraction: float = Field(default=0.1, ge=0, le=1)
    duplicated_fraction: float = Field(default=0.0, ge=0, lt=1)
    cells_per_block: int = Field(default=4096, ge=1)
    workers: int = Field(default=0, ge=0)

    @property
    def num_mitochondrial(self) -> int:
        """Mitochondrial genes: 13, or fewer where there are few genes."""
        return min(_MITOCHONDRIAL, self.num_genes // 20)

    @property
    def num_targets(self) -> int:
        """Distinct genes that regulators may act on: two thirds of the edges."""
        edges = self.num_regulators * self.targets_per_regulator
        return max(self.targets_per_regulator, -(-edges * 2 // 3)) if edges else 0

    @property
    def num_special(self) -> int:
        """Genes with a role: regulators, targets, pathway members and markers, all distinct."""
        return (
            self.num_regulators
            + self.num_targets
            + self.num_pathways * self.genes_per_pathway
            + self.num_lineages * self.markers_per_lineage
            + self.num_types * self.markers_per_type
        )

    @model_validator(mode="after")
    def _fits(self) -> SynthesizeConfig:
        if self.num_special + self.num_mitochondrial > self.num_genes:
            raise ValueError(
                f"{self.num_special} genes have a role (regulators, targets, pathway members, "
                f"markers) and {self.num_mitochondrial} are mitochondrial, but num_genes = "
                f"{self.num_genes}; raise num_genes, or lower num_types, markers_per_type, "
                "num_regulators, targets_per_regulator, num_pathways or genes_per_pathway"
            )
        if not self.library_size and self.mean_genes_per_cell > 0.8 * self.num_genes:
            raise ValueError(
                f"mean_genes_per_cell = {self.mean_genes_per_cell:g} is more than 80 % of "
                f"num_genes = {self.num_genes}; lower it, or set library_size"
            )
        if self.num_lineages > self.num_types:
            raise ValueError(
                f"num_lineages = {self.num_lineages} is more than num_types = {self.num_types}"
            )
        if self.num_knockouts > self.num_regulators:
            raise ValueError(
                f"num_knockouts = {self.num_knockouts} is more than num_regulators = "
                f"{self.num_regulators}: only regulators are knocked out"
            )
        if self.num_datasets > self.num_cells:
            raise ValueError(
                f"num_datasets = {self.num_datasets} is more than num_cells = {self.num_cells}: "
                "a dataset has at least one cell"
            )
        return self
