"""What a baseline is: a cheap method fitted on raw counts, run beside every model.

A benchmark calls two functions, whatever the unit offers: :func:`annotate_with` (a label for every
query cell) and :func:`embed_with` (a vector for every cell).

Legend: N cells, Q query cells, G genes, D width of an embedding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from scipy import sparse

from cellray.baselines._vote import neighbour_vote
from cellray.core import registry
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import Section

__all__ = [
    "Answers",
    "BaselineConfig",
    "BaselineUnit",
    "CellCounts",
    "Labelled",
    "Predictor",
    "annotate_with",
    "baseline",
    "check_available",
    "check_genes",
    "check_training",
    "embed_with",
    "no_fit",
    "units_for",
]

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Answers = Literal["labels", "embedding"]


class BaselineConfig(Section):
    """Keys every baseline has; each adds its own in its own file.

    Attributes:
        name: the baseline's module name.
    """

    name: str


@dataclass(frozen=True)
class CellCounts:
    """What a baseline may know of cells: never a label.

    Attributes:
        counts: (N, G) raw counts, csr.
        batches: (N,) int64 codes of batch or donor, one code for one batch in training and query
            cells alike; None if the data have none.

    Raises:
        DataError: one batch a cell is not what ``batches`` gives.
    """

    counts: sparse.csr_matrix
    batches: I64 | None = None

    def __post_init__(self) -> None:
        if self.batches is not None and len(self.batches) != self.num_cells:
            raise DataError(
                f"{self.num_cells} cells but {len(self.batches)} batches; give one a cell"
            )

    @property
    def num_cells(self) -> int:
        """N."""
        return int(self.counts.shape[0])

    @property
    def num_genes(self) -> int:
        """G."""
        return int(self.counts.shape[1])

    def rows(self, cells: npt.NDArray[Any]) -> CellCounts:
        """These cells (positions or a mask) in this order."""
        batches = None if self.batches is None else self.batches[cells]
        return CellCounts(self.counts[cells], batches)

    def only(self, genes: npt.NDArray[Any]) -> CellCounts:
        """The same cells over these genes (positions or a mask) alone.

        A baseline then sees what a model with that vocabulary sees: library sizes, too, are sums
        over these genes.

        Raises:
            DataError: no gene is left.
        """
        chosen = self.counts[:, genes].tocsr()
        if not chosen.shape[1]:
            raise DataError(
                "no gene is left to run baselines on; check how the model's genes were matched"
            )
        return CellCounts(chosen, self.batches)


@dataclass(frozen=True)
class Labelled:
    """A label for each of N cells.

    Attributes:
        codes: (N,) int64 class codes.
        confidence: (N,) float64 in [0, 1], the share or probability of the class that was chosen;
            None if the method has none.
        embedding: (N, D) float32, the space it decides in; None if it has none.
    """

    codes: I64
    confidence: F64 | None = None
    embedding: F32 | None = None


class Predictor(Protocol):
    """A fitted baseline: a pure function of a cell's counts, one cell at a time or many."""

    def answer(self, counts: sparse.csr_matrix) -> Labelled:
        """Class codes of the cells of ``counts`` (N, G), how sure of each, and where it lies."""
        ...

    def predict(self, counts: sparse.csr_matrix) -> I64:
        """Class codes (N,) alone."""
        ...

    def embed(self, counts: sparse.csr_matrix) -> F32 | None:
        """The space it decides in, (N, D); None if it has none."""
        ...


def no_fit(config: Any, counts: sparse.csr_matrix, labels: I64, seed: int) -> Predictor:
    """``fit`` of a unit that has none.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"baseline '{config.name}' is not fitted to labels; annotate_with lets the neighbours vote "
        "in its embedding"
    )


def _one_trial(config: Any) -> int:
    return 1


@dataclass(frozen=True, kw_only=True)
class BaselineUnit:
    """What a baseline's module exports as ``BASELINE``.

    Of ``fit``, ``label``, ``embed`` and ``embed_labels`` it offers at least one.

    Attributes:
        name: equals the module's name.
        config: its configuration class; ``config()`` gives the defaults.
        seed_scope: what a seed changes; "" says nothing at all: on one fixed split its spread
            over seeds is then not 0 but not applicable.
        title: what it does, in a few words.
        fit: (config, counts (N, G) raw float32 csr, labels (N,) int64 codes, seed) -> predictor;
            sees training cells only.
        label: (config, training cells, labels (N,), query cells, seed) -> labels of the query
            cells, for a unit that needs their batches to tell.
        embed: (config, cells to fit on, query cells or None, seed) -> their embeddings (N, D) and
            (Q, D) or None, float32; without ``fit``, labels are a vote of neighbours in it.
        embed_labels: (config, cells, labels (N,), seed) -> (N, D) made from the truth; of a
            control only.
        answers: the kinds of task it makes sense for.
        family: ``control`` if it is there to show what a metric says of nonsense or of the truth.
        control: ``negative`` for a control that no method may fall below unflagged, ``positive``
            for one that none may surpass.
        transductive: it sees the counts (never the labels) of query cells when it is fitted.
        needs_batches: it cannot run without a batch for every cell.
        requires: Python modules of an optional extra that it needs.
        extra: name of that extra.
        trials: config -> configurations it tries before it settles on one: its tuning budget.
        revision: raised when the same configuration begins to give other answers, so that a
            benchmark that goes on does not mix both.

    Raises:
        ConfigError: it offers nothing, or it is made from the truth and calls itself a baseline.
    """

    name: str
    config: type[BaselineConfig]
    seed_scope: str
    title: str
    fit: Callable[[Any, sparse.csr_matrix, I64, int], Predictor] = no_fit
    label: Callable[[Any, CellCounts, I64, CellCounts, int], Labelled] | None = None
    embed: Callable[[Any, CellCounts, CellCounts | None, int], tuple[F32, F32 | None]] | None = None
    embed_labels: Callable[[Any, CellCounts, I64, int], F32] | None = None
    answers: tuple[Answers, ...] = ("labels",)
    family: Literal["baseline", "control"] = "baseline"
    control: Literal["", "negative", "positive"] = ""
    transductive: bool = False
    needs_batches: bool = False
    requires: tuple[str, ...] = ()
    extra: str = ""
    trials: Callable[[Any], int] = _one_trial
    revision: int = 1

    def __post_init__(self) -> None:
        offers = (self.label, self.embed, self.embed_labels)
        if self.fit is no_fit and not any(offers):
            raise ConfigError(
                f"baseline '{self.name}' offers none of fit, label, embed and embed_labels"
            )
        if self.needs_labels and self.family != "control":
            raise ConfigError(
                f"baseline '{self.name}' is made from the truth (embed_labels): its family can be "
                f"'control' only, not '{self.family}'"
            )

    @property
    def needs_labels(self) -> bool:
        """Whether it is made from the true labels of all cells: a control, never a method."""
        return self.embed_labels is not None


def baseline(name: str) -> BaselineUnit:
    """Find a baseline by its key or by ``module.path:BASELINE``.

    Raises:
        ConfigError: there is none.
    """
    found = registry.find("cellray.baselines", name, "BASELINE")
    assert isinstance(found, BaselineUnit), f"{name} exports a {type(found).__name__} as BASELINE"
    return found


def units_for(answers: Answers) -> list[str]:
    """Names of the units that make sense for a task answered with labels or with an embedding."""
    every = registry.names("cellray.baselines")
    return [name for name in every if answers in baseline(name).answers]


def check_available(unit: BaselineUnit) -> None:
    """Refuse a unit whose optional packages are not installed.

    Raises:
        ConfigError: one is missing; names the extra and the command that installs it.
    """
    missing = [name for name in unit.requires if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"baseline '{unit.name}' needs the Python module {', '.join(missing)}, which is not "
            f"installed here; it is in the optional extra '{unit.extra}': pip install "
            f"'cellray[{unit.extra}]', or leave the baseline out"
        )


def annotate_with(
    unit: BaselineUnit,
    config: BaselineConfig,
    train: CellCounts,
    labels: I64,
    query: CellCounts,
    seed: int,
) -> Labelled:
    """Label query cells with any baseline.

    Args:
        unit: the baseline.
        config: its configuration.
        train: N labelled cells.
        labels: (N,) int64 codes, none negative.
        query: Q cells over the same genes, batches coded alike.
        seed: what is drawn in the fit is drawn from it.

    Returns:
        Codes, confidences and, where there is one, the embedding of the query cells.

    Raises:
        ConfigError: the unit gives no labels, or needs a package that is not installed.
        DataError: the cells are not raw counts over the same genes, no training cell has a label,
            or the unit needs batches that are not there or all the same.
    """
    check_available(unit)
    check_training(train.counts, labels)
    check_genes(query.counts, train.num_genes)
    _check_batches(unit, train, query)
    if unit.label is None and unit.fit is no_fit and unit.embed is None:
        raise ConfigError(
            f"baseline '{unit.name}' gives no labels ({unit.title}); for a task answered with "
            f"labels take one of {', '.join(units_for('labels'))}"
        )
    if query.num_cells == 0:
        return Labelled(np.zeros(0, dtype=np.int64), np.zeros(0))
    if unit.label is not None:
        return unit.label(config, train, labels, query, seed)
    if unit.fit is not no_fit:
        return unit.fit(config, train.counts, labels, seed).answer(query.counts)
    assert unit.embed is not None
    reference, embedding = unit.embed(config, train, query, seed)
    assert embedding is not None
    codes, confidence = neighbour_vote(reference, labels, embedding)
    return Labelled(codes, confidence, embedding)


def embed_with(
    unit: BaselineUnit,
    config: BaselineConfig,
    cells: CellCounts,
    seed: int,
    *,
    truth: I64 | None = None,
) -> F32:
    """Embed cells with any baseline that has an embedding, fitted on the same cells.

    Args:
        unit: the baseline.
        config: its configuration.
        cells: N cells.
        seed: what is drawn in the fit is drawn from it.
        truth: (N,) true label codes. Handed on to a control that is made from them
            (``unit.needs_labels``); no other unit ever sees them.

    Returns:
        (N, D) float32.

    Raises:
        ConfigError: the unit has no embedding, needs a package that is not installed, or is a
            control made from the truth and ``truth`` is not given.
        DataError: the cells are not raw counts, there are none, or the unit needs batches that are
            not there or all the same.
    """
    check_available(unit)
    if not cells.num_cells:
        raise DataError("no cell to embed; check the selection")
    _check_raw(cells.counts)
    _check_batches(unit, cells)
    if unit.embed_labels is not None:
        if truth is None:
            raise ConfigError(
                f"control '{unit.name}' is made from the true labels; give truth, or leave it out"
            )
        check_training(cells.counts, truth)
        return unit.embed_labels(config, cells, truth, seed)
    if unit.embed is None:
        raise ConfigError(
            f"baseline '{unit.name}' has no embedding ({unit.title}); for a task answered with an "
            f"embedding take one of {', '.join(units_for('embedding'))}"
        )
    return unit.embed(config, cells, None, seed)[0]


def check_training(counts: sparse.csr_matrix, labels: I64) -> None:
    """Refuse training cells that no baseline can use.

    Raises:
        DataError: no cell, lengths differ, a negative code, or counts that are not raw.
    """
    if counts.shape[0] != len(labels):
        raise DataError(f"{counts.shape[0]} training cells but {len(labels)} labels")
    if not len(labels):
        raise DataError("no training cell with a label; check the label column and the split")
    if labels.min() < 0:
        raise DataError(
            f"{int((labels < 0).sum())} training labels are negative codes (missing or unseen); "
            "drop those cells before fitting"
        )
    _check_raw(counts)


def _check_batches(unit: BaselineUnit, *groups: CellCounts) -> None:
    if not unit.needs_batches:
        return
    given = [cells.batches for cells in groups if cells.batches is not None]
    if len(given) < len(groups):
        raise DataError(
            f"baseline '{unit.name}' needs the batch of every cell and there is none; name the obs "
            "column of the batch (donor, sample, technology), or leave the baseline out"
        )
    batches = np.concatenate(given)
    missing = int((batches < 0).sum())
    if missing:
        raise DataError(
            f"{missing} of {len(batches)} cells have no batch, which baseline '{unit.name}' needs; "
            "drop those cells or name another batch column"
        )
    if len(np.unique(batches)) < 2:
        does = "goes by" if unit.embed is None else "corrects"
        raise DataError(
            f"baseline '{unit.name}' {does} batches and the cells are of one; name another batch "
            "column, or leave the baseline out"
        )


def _check_raw(counts: sparse.csr_matrix) -> None:
    values = counts.data
    if not np.isfinite(values).all() or (values < 0).any():
        raise DataError("baselines take raw counts; these hold negative or missing values")
    if (values != np.floor(values)).any():
        raise DataError(
            "baselines take raw counts and normalise them themselves; these are not whole numbers"
        )


def check_genes(counts: sparse.csr_matrix, num_genes: int) -> None:
    """Refuse cells over another gene space than the one that was fitted.

    Raises:
        DataError: another number of genes, or counts that are not raw.
    """
    if counts.shape[1] != num_genes:
        raise DataError(
            f"fitted on {num_genes} genes but asked about cells over {counts.shape[1]}; give both "
            "in the same gene order"
        )
    _check_raw(counts)
