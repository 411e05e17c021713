"""The ``[data]`` section: which cells of which store, in what order."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cellray.core.section import MAX_SEED, Section, flatten

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
    salt: int = Field(default=0, ge=0, le=MAX_SEED)


class DataSection(Section):
    """Which cells a run sees.

    Attributes:
        uri: a SOMA experiment, one of ours or one of the CELLxGENE Census: a local folder or an
            object-store address; or a list of them, read as a mixture.
        weights: one number a store: its share of every global batch, in any scale; none takes the
            stores by their numbers of selected cells.
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
        run_cells: neighbouring cells kept together when the epoch is permuted; 64 fits the tiles
            of stores that cellray writes.
        window_cells: cells shuffled among each other, over all workers. The one key that trades
            the quality of the shuffle against speed and memory: a batch mixes the
            ``window_cells / run_cells`` runs of its window. ``--check`` states the quality.
        lanes: parts of the order walked side by side, a divisor of ``batch.cells_global``; 0 takes
            its largest up to 64. Workers share them: a multiple of ``scale.workers`` gives each as
            many cells of a step.
        bucket_by_length: put cells of like length in a batch (needs obs ``nnz``).
        vocab_genes: with ``vocab = "store"``, keep this many genes, the most variable among the
            training cells (scGPT's fine-tuning recipe keeps 3,000); 0 keeps all.
        statistics_cells: training cells that variable genes and a rank tokenizer's non-zero
            medians are computed on; when there are more, a keyed sample of this many.
        statistics: where a rank tokenizer's non-zero medians come from: "train", the training
            cells, exactly; "store", the streamed medians over all cells of the store that ingest
            has kept, at no cost (they include cells that are held out).
        held_out: datasets (values of ``held_out_by``) that the run never sees.
        held_out_by: the obs column they are values of.
        balance_by: obs column whose values are made equally frequent among the training cells,
            e.g. ``cell_type``; "" takes every cell once an epoch.
        balance_max_repeats: with ``balance_by``, how often a cell may come in an epoch.
        cache: folder of a token cache, on a disk that all workers see: the selection is tokenised
            once and read back memory-mapped; "" tokenises in every epoch.
        allow_gene_loss: go on where the vocabulary of a checkpoint covers less than 60 % of the
            counts; otherwise that is an error.
        corpus_hashes: whether a training run notes content hashes of its cells beside the model, by
            which test cells among them are known later: "auto" does where obs keeps them or for
            at most 200,000 cells, "always" reads all counts where it must, "never" does not.
        split: how validation cells are set apart.
    """

    uri: str | list[str]
    weights: list[float] = []
    timestamp: str = ""
    tiledb: dict[str, str] = {}
    measurement: str = "RNA"
    layer: str = "raw"
    obs_filter: str = ""
    covariates: list[str] = []
    min_genes_per_cell: int = Field(default=0, ge=0)
    vocab: str = "store"
    run_cells: int = Field(default=64, ge=1)
    window_cells: int = Field(default=16_384, ge=1)
    lanes: int = Field(default=0, ge=0)
    bucket_by_length: bool = True
    vocab_genes: int = Field(default=0, ge=0)
    statistics_cells: int = Field(default=200_000, ge=1)
    statistics: Literal["train", "store"] = "train"
    held_out: list[str] = []
    held_out_by: str = "dataset_id"
    balance_by: str = ""
    balance_max_repeats: int = Field(default=10, ge=1, le=32)
    cache: str = ""
    allow_gene_loss: bool = False
    corpus_hashes: Literal["auto", "always", "never"] = "auto"
    split: SplitSection = SplitSection()

    @field_validator("tiledb", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        """``vfs.s3.region = "x"`` without quotes is a table in a table in TOML."""
        return flatten(value) if isinstance(value, dict) else value

    @property
    def uris(self) -> list[str]:
        """The stores, one or more."""
        return [self.uri] if isinstance(self.uri, str) else list(self.uri)

    @model_validator(mode="after")
    def _stores(self) -> DataSection:
        if not self.uris or not all(self.uris):
            raise ValueError("data.uri names no store; give an address, or a list of them")
        if self.weights and len(self.weights) != len(self.uris):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers for {len(self.uris)} stores; give "
                "one a store"
            )
        if any(not w > 0 for w in self.weights):
            raise ValueError(f"data.weights = {self.weights}: every weight must be above 0")
        return self
