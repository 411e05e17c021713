"""One data set of a benchmark: its cells, the split of each seed, and what all its rows share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from cellray.baselines.base import CellCounts, embed_with
from cellray.baselines.base import baseline as find_baseline
from cellray.bench.config import DatasetSection
from cellray.bench.provenance import provenance
from cellray.bench.table import ResultRow
from cellray.core.section import to_dict
from cellray.data.dataset_name import SYNTHETIC, is_synthetic
from cellray.data.stats import coverage
from cellray.data.tokens import TokenSource
from cellray.data.vocab import Vocab
from cellray.guards.entry import GuardReport, check_table_data, guard_split
from cellray.guards.training import did_it_train
from cellray.infer.embed import token_source
from cellray.infer.load import LoadedModel
from cellray.tasks._labels import given, labels_of
from cellray.tasks.base import Split, Targets, Task, TaskConfig, asked_cells, task
from cellray.train.prepare import Cells, select_cells
from cellray.train.rundir import RunDirectory

if TYPE_CHECKING:
    from cellray.runs import BenchmarkRun

__all__ = ["Parent", "Part", "Setting", "open_setting"]

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
Texts = npt.NDArray[Any]
_BLOCK_CELLS = 4096


@dataclass(frozen=True)
class Parent:
    """The MLflow run that a data set's rows are children of."""

    uri: str
    run_id: str
    experiment: str


@dataclass(frozen=True)
class Part:
    """How a seed divides the cells.

    Attributes:
        seed: which.
        split: training, validation and test cells; the test cells are every seed's.
        targets: classes of the training cells, and codes.
        asked: ascending joinids that a method answers for.
    """

    seed: int
    split: Split
    targets: Targets
    asked: I64


@dataclass(frozen=True)
class Setting:
    """A data set whose rows make one table.

    Attributes:
        run: the benchmark.
        name: the data set's name in it.
        unit: the task.
        cells: the selection.
        directory: where results, pictures and fine-tuning runs of this set lie.
        parent: None without tracking.
        files: fine-tuning files that were read already, path -> tables: on another machine they
            may not lie at their paths.
    """

    run: BenchmarkRun
    name: str
    unit: Task
    cells: Cells
    directory: Path
    parent: Parent | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    _parts: dict[int, Part] = field(default_factory=dict, repr=False, compare=False)

    @property
    def section(self) -> DatasetSection:
        """The data set's section."""
        return self.run.datasets[self.name]

    @property
    def config(self) -> TaskConfig:
        """The task's section, as it holds for this set."""
        assert isinstance(self.section.task, TaskConfig)
        return self.section.task

    @property
    def batch_column(self) -> str:
        """The obs column of batches: the task's, else the one that the split holds out whole."""
        split = to_dict(self.config).get("split") or {}
        return self.config.batch or str(split.get("column") or "")

    def part(self, seed: int) -> Part:
        """The split of a seed; only the validation cells depend on it."""
        if seed not in self._parts:
            split = self.unit.split(self.cells.keyed(), self.config, seed=seed)
            split = guard_split(self.cells, split, self.config).split
            targets = self.unit.fit(self.cells.obs, self.config, split)
            self._parts[seed] = Part(seed, split, targets, asked_cells(self.unit, split))
        return self._parts[seed]

    @property
    def first(self) -> Part:
        """The split of the first seed."""
        return self.part(self.run.seeds[0])

    def rows(self, joinids: I64) -> I64:
        """Positions of cells in ``cells.obs``."""
        return np.searchsorted(self.cells.joinids, joinids)

    def column(self, name: str, joinids: I64) -> Texts:
        """Values of an obs column as text."""
        texts = self.cells.obs[name].astype(str).to_numpy()
        return np.asarray(texts[self.rows(joinids)], dtype=object)

    def truth(self, joinids: I64) -> Texts:
        """True labels; only what scores and draws asks for them."""
        return self.column(self.config.label, joinids)

    def codes(self, part: Part, joinids: I64) -> I64:
        """Class codes of training cells."""
        return part.targets.codes[self.rows(joinids)]

    def batches(self, joinids: I64) -> I64 | None:
        """Codes of the batches, None if there are none."""
        if not self.batch_column:
            return None
        codes, _ = pd.factorize(self.cells.obs[self.batch_column].astype(str), sort=True)
        return np.asarray(codes[self.rows(joinids)], dtype=np.int64)

    def counts(self, joinids: I64) -> CellCounts:
        """Raw counts of cells over all genes of the store, (N, G) float32, and their batches."""
        store = self.cells.store
        every = np.arange(store.num_genes, dtype=np.int32)
        parts = []
        for first in range(0, len(joinids), _BLOCK_CELLS):
            block = store.read_block(joinids[first : first + _BLOCK_CELLS], every)
            shape = (len(block), store.num_genes)
            parts.append(sparse.csr_matrix((block.counts, block.genes, block.indptr), shape=shape))
        return CellCounts(sparse.csr_matrix(sparse.vstack(parts)), self.batches(joinids))

    def labelled(self, joinids: I64) -> npt.NDArray[np.bool_]:
        """Which cells have a label that counts."""
        ignored = to_dict(self.config).get("ignore_labels") or []
        column = self.cells.obs[self.config.label].iloc[self.rows(joinids)]
        return given(labels_of(column, ignored))

    @property
    def content_sha256(self) -> str:
        """Over the cells' ids and counts, and what labels and batches say of them."""
        digest = hashlib.sha256(self.cells.store.fingerprint(self.cells.joinids).encode())
        for column in dict.fromkeys(c for c in (self.config.label, self.batch_column) if c):
            digest.update(f"\0{column}\0".encode())
            digest.update("\n".join(self.column(column, self.cells.joinids)).encode())
        return digest.hexdigest()

    def label_codes(self, joinids: I64) -> I64:
        """Codes of the true labels, for controls that are to know the answer."""
        codes, _ = pd.factorize(self.truth(joinids), sort=True)
        return np.asarray(codes, dtype=np.int64)

    @property
    def donor_column(self) -> str:
        """The obs column whose values are resampled whole for intervals; "" if there is none."""
        donors = to_dict(self.config).get("donor_columns") or []
        candidates = [*donors, self.batch_column]
        return next((c for c in candidates if c and c in self.cells.obs), "")

    def tokens_of(self, model: LoadedModel, *, allow_gene_loss: bool = False) -> TokenSource:
        """What turns this set's cells into a model's tokens.

        Raises:
            DataError: the model knows under 60 % of the counts, and ``data.allow_gene_loss`` does
                not let it pass.
        """
        allowed = allow_gene_loss or self.section.data.allow_gene_loss
        return token_source(model, self.cells, allow_gene_loss=allowed)[0]

    @property
    def num_neighbours(self) -> int:
        """Training cells that vote, where the task says how many."""
        return int(to_dict(self.config).get("num_neighbors") or 10)

    def gene_loss(self, vocab: Vocab) -> Mapping[str, Any]:
        """How many genes and counts of the cells a model knows, as fields of a row."""
        found = coverage(self.cells.store, vocab, joinids=self.cells.joinids)
        return {
            "gene_map_id": vocab.fingerprint[:16],
            "genes_in": found.genes_in_store,
            "genes_matched": found.genes_matched,
            "umi_fraction_matched": found.count_fraction,
        }

    def trained_remarks(self, part: Part, train_accuracy: float) -> tuple[str, ...]:
        """A flag on a model that does no better on its training cells than the majority class.

        None where no class is learnt: of an embedding there is no such accuracy.
        """
        codes = self.codes(part, part.split.train)
        if not part.targets.classes:
            return ()
        majority = float(np.bincount(codes).max() / len(codes))
        sampled = min(len(codes), 1024)
        if not did_it_train(train_accuracy, majority, num_cells=sampled):
            return ()
        return ("did not train: no better on its own training cells than the majority class",)

    @cached_property
    def before(self) -> F32:
        """Principal components of the asked cells without integration, (N, P)."""
        unit = find_baseline("pca")
        return embed_with(unit, unit.config(name="pca"), self.counts(self.first.asked), 0)

    @cached_property
    def guards(self) -> GuardReport:
        """What a reader of this set's table must know, from its cells and split alone."""
        return check_table_data(self.cells, self.first.split, self.config)

    @cached_property
    def dataset_id(self) -> str:
        """The name a reader knows; made data say so."""
        return f"{SYNTHETIC}{self.name}" if is_synthetic(self.cells.store) else self.name

    @cached_property
    def template(self) -> ResultRow:
        """The fields that all rows of this set share."""
        first, split = self.first, self.first.split
        unseen = set(self.truth(split.test)) - set(first.targets.classes) if len(split.test) else ()
        return ResultRow(
            task=self.unit.name,
            dataset_id=self.dataset_id,
            dataset_license=self.section.license,
            method="",
            method_family="baseline",
            status="skipped",
            dataset_sha256=self.content_sha256,
            split_id=self.section.split_id or split.unit,
            split_sha256=split.split_sha256,
            split_unit=split.unit,
            n_cells=len(self.cells.joinids),
            n_genes=self.cells.store.num_genes,
            n_train=len(split.train),
            n_val=len(split.validation),
            n_test=len(split.test),
            n_classes_train=len(first.targets.classes),
            n_classes_test=len(set(self.truth(first.asked[self.labelled(first.asked)]))),
            n_classes_unseen=len(unseen),
            **provenance(),
        )

    def tags(self) -> Mapping[str, str]:
        """What the MLflow parent says of the table, so that it can be drawn from there alone."""
        return {
            "cellray.benchmark": self.run.name,
            "cellray.task": self.unit.name,
            "cellray.dataset": self.dataset_id,
            "cellray.split": self.first.split.split_sha256,
            "cellray.headline": self.unit.headline,
            "cellray.warnings": json.dumps(list(self.guards.warnings)),
        }


def open_setting(
    run: BenchmarkRun,
    name: str,
    parent: Parent | None = None,
    files: Mapping[str, Mapping[str, Any]] | None = None,
) -> Setting:
    """Open a data set of a benchmark.

    Raises:
        CellrayError: the store, a column or the split does not fit the configuration.
    """
    section = run.datasets[name]
    assert isinstance(section.task, TaskConfig)
    unit = task(section.task.name)
    config = section.task

    def columns(known: list[str]) -> list[str]:
        named = unit.columns(config, known)
        return [*named, *([config.batch] if config.batch and config.batch not in named else [])]

    cells = select_cells(section.data, columns)
    directory = RunDirectory(run.checkpoint.dir, run.name).path / name
    return Setting(run, name, unit, cells, directory, parent, files or {})
