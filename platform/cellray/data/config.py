"""The ``[data]`` section: which cells of which store, in what order."""

from __future__ import annotations

from pydantic import Field

from cellray.core.section import Section

__all__ = ["DataSection", "SplitSection"]


class SplitSection(Section):
    """How validation cells are set apart, by a stable hash: new cells never move old ones.

    Attributes:
        by: obs column whose values are kept whole (e.g. ``donor_id``); "" splits cell by cell.
        validation_fraction: share of the cells (or of the column's values) set apart, 0..1.
        salt: another salt gives another split.
    """

    by: str = ""
    validation_fraction: float = Field(default=0.05, ge=0.0, lt=1.0)
    salt: int = 0


class DataSection(Section):
    """Which cells a run sees.

    Attributes:
        uri: a SOMA experiment, one of ours or one of the CELLxGENE Census: a local folder or an
            object-store address.
        timestamp: read the store as it was then, e.g. ``2026-11-22T12:00:00Z``; "" pins the
            moment the run begins, so that what others append during the run is not seen.
        tiledb: TileDB settings for this store, e.g. ``"vfs.s3.endpoint_override"``; no secrets:
            those come from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``).
        measurement: its measurement, e.g. ``RNA``.
        layer: the X layer with raw counts.
        obs_filter: rows to keep, in SOMA's own filter language; "" keeps all.
        covariates: obs columns that travel with each cell as codes.
        min_genes_per_cell: cells with fewer detected genes are left out (needs obs ``nnz``).
        vocab: "store" builds the vocabulary from the store's genes; else a vocabulary file.
        run_cells: neighbouring cells kept together when the epoch is permuted.
        window_batches: global batches shuffled among each other: memory against mixing.
        lanes: parts of the order walked side by side, a multiple of ``scale.workers`` that
            divides ``batch.cells_global``; 0 takes its largest divisor up to 64.
        bucket_by_length: put cells of like length in a batch (needs obs ``nnz``).
        vocab_genes: with ``vocab = "store"``, keep this many genes, the most variable among the
            training cells (scGPT's fine-tuning recipe keeps 3,000); 0 keeps all.
        statistics_cells: training cells that variable genes and a rank tokenizer's non-zero
            medians are computed on; when there are more, a keyed sample of this many.
        split: how validation cells are set apart.
    """

    uri: str
    timestamp: str = ""
    tiledb: dict[str, str] = {}
    measurement: str = "RNA"
    layer: str = "raw"
    obs_filter: str = ""
    covariates: list[str] = []
    min_genes_per_cell: int = Field(default=0, ge=0)
    vocab: str = "store"
    run_cells: int = Field(default=64, ge=1)
    window_batches: int = Field(default=32, ge=1)
    lanes: int = Field(default=0, ge=0)
    bucket_by_length: bool = True
    vocab_genes: int = Field(default=0, ge=0)
    statistics_cells: int = Field(default=200_000, ge=1)
    split: SplitSection = SplitSection()
