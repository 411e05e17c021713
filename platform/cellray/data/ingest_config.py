"""The ``[ingest]`` table: which files, what of them, by which rules, into which store."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cellray.core.section import Section

__all__ = ["IngestConfig", "MeasurementConfig"]


class MeasurementConfig(Section):
    """``[ingest.measurements.NAME]``: what else was measured in the same cells.

    Exactly one of ``files``, ``obsm``, ``feature_types`` and ``modality`` says where it is. Feature
    ids are kept as the files give them.

    Attributes:
        files: one h5ad file for each file of ``ingest.files``, "" where there is none; cells are
            joined by cell id.
        obsm: name of an obsm of the main files: a table, or a matrix whose columns are named in
            uns (``protein_counts``: ``protein_counts_names`` or ``protein_names``).
        feature_types: the features of the main files whose var ``feature_types`` says so, e.g.
            ``Peaks`` or ``Antibody Capture``; they are no genes of the RNA measurement then.
        modality: of the main files, which are h5mu (MuData), e.g. ``atac``; their RNA is read from
            the modality ``rna``, and cells are joined by cell id.
        layer: where the counts are in ``files`` or in the modality, as ``ingest.layer``.
    """

    files: list[str] = []
    obsm: str = ""
    feature_types: str = ""
    modality: str = ""
    layer: str = "auto"

    @model_validator(mode="after")
    def _one_origin(self) -> MeasurementConfig:
        given = [n for n in ("files", "obsm", "feature_types", "modality") if getattr(self, n)]
        if len(given) != 1:
            raise ValueError(
                "a measurement needs exactly one of files, obsm, feature_types and modality; "
                f"given: {', '.join(given) or 'none'}"
            )
        if self.files and not any(self.files):
            raise ValueError('files holds only ""; leave the measurement out')
        return self


class IngestConfig(Section):
    """The ``[ingest]`` table.

    Attributes:
        files: h5ad files, or h5mu files with a modality ``rna``; paths and globs.
        uri: the store to make, a local folder or ``s3://bucket/store``; a local one can also be
            appended to.
        layer: where the raw counts are: ``X``, ``raw.X``, the name of a layer, or ``auto``: X if
            it holds raw counts, else raw.X.
        scratch: where a store for an object store is built before it is copied; "" takes the
            system's folder for temporary files.
        tiledb: TileDB settings of the object store, as ``data.tiledb``.
        organism: whose table maps symbols to Ensembl ids: ``human``, ``mouse`` or ``auto``.
        gene_id_column: var column whose ids are preferred to the index; ``auto``: a column of
            Ensembl ids, consulted where the index holds none.
        dataset_ids: one name a file; default: the file names without ``.h5ad``.
        cell_id_column: obs column with the cell ids; "" takes the index.
        duplicate_genes: ``error``, or ``sum``: add the counts of rows with the same gene id. Rows
            with ids of their own that mean one gene (a symbol beside its Ensembl id) are always
            added up, and the report says how many.
        append: add to a store that is there; false refuses if there is one.
        cells_per_block: rows read, checked and written at a time.
        workers: processes that read and write, as Ray tasks. 1: this process alone, without Ray;
            0: one for each CPU, but none for fewer than 20,000 cells.
        min_genes_per_cell: cells with fewer detected genes are left out.
        min_counts_per_cell: cells with a smaller sum of counts are left out.
        max_mito_fraction: cells with a greater share of mitochondrial counts (genes whose symbol
            starts with ``MT-``, or ``mt-``) are left out.
        primary_only: cells that say ``is_primary_data = false`` (Census' word for a copy) are
            left out; files that do not say are taken whole.
        duplicate_cells: cells with the counts of an earlier cell, in the same genes: ``flag``
            them in obs ``is_duplicate``, ``drop`` them, or ``keep`` them unmarked.
        measurements: what else was measured in the same cells, by name, e.g. ``ATAC``.
    """

    files: list[str]
    uri: str = Field(min_length=1)
    scratch: str = ""
    tiledb: dict[str, str] = {}
    layer: str = "auto"
    organism: Literal["auto", "human", "mouse"] = "auto"
    gene_id_column: str = "auto"
    dataset_ids: list[str] = []
    cell_id_column: str = ""
    duplicate_genes: Literal["error", "sum"] = "error"
    append: bool = True
    cells_per_block: int = Field(default=4096, ge=1)
    workers: int = Field(default=0, ge=0)
    min_genes_per_cell: int = Field(default=0, ge=0)
    min_counts_per_cell: int = Field(default=0, ge=0)
    max_mito_fraction: float = Field(default=1.0, ge=0.0, le=1.0)
    primary_only: bool = False
    duplicate_cells: Literal["flag", "drop", "keep"] = "flag"
    measurements: dict[str, MeasurementConfig] = {}

    @model_validator(mode="after")
    def _names(self) -> IngestConfig:
        for name in self.measurements:
            if name == "RNA" or not name.isidentifier():
                raise ValueError(
                    f"measurements.{name}: name a measurement with letters, digits and '_', and "
                    "not RNA, which the main files hold"
                )
        return self
