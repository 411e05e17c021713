"""What a baseline is: a cheap method fitted on raw counts, run beside every model.

Legend: N cells, G genes, D width of an embedding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.neighbors import NearestNeighbors

from cellray.core import registry
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import Section
from cellray.core.voting import vote

__all__ = [
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
    "vote_of_nearest",
]

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

NUM_NEIGHBORS = 15  # that vote where a unit gives an embedding alone: those of ``knn``


def _one(config: Any) -> int:
    return 1


class BaselineConfig(Section):
    """Keys every baseline has; each adds its own in its own file.

    Attributes:
        name: the baseline's module name.
    """

    name: str


@dataclass(frozen=True)
class CellCounts:
    """Cells as a baseline sees them.

    Attributes:
        counts: (N, G) raw counts, float32 csr.
        batches: (N,) int64 codes of the batches, None if there are none.
    """

    counts: sparse.csr_matrix
    batches: I64 | None = None

    def __len__(self) -> int:
        return int(self.counts.shape[0])

    def only(self, genes: I64) -> CellCounts:
        """The same cells over some of the genes: (K,) positions."""
        return CellCounts(sparse.csr_matrix(self.counts[:, genes]), self.batches)


@dataclass(frozen=True)
class Labelled:
    """What a method says of N cells.

    Shapes:
        codes: (N,) int64 class codes.
        confidence: (N,) float64 in 0..1, None if the method does not say how sure it is.
        embedding: (N, D) the space it decides in, None if it has none.
    """

    codes: I64
    confidence: F64 | None = None
    embedding: F32 | None = None


class Predictor(Protocol):
    """A fitted baseline: a pure function of a cell's counts, one cell at a time or many."""

    def label(self, counts: sparse.csr_matrix) -> Labelled:
        """Class codes of the cells of ``counts`` (N, G), and how sure they are."""
        ...

    def embed(self, counts: sparse.csr_matrix) -> F32 | None:
        """The space it decides in, (N, D); None if it has none."""
        ...


# (config, cells to fit on, further cells or None, seed) -> vectors of both
Embed = Callable[[Any, CellCounts, CellCounts | None, int], tuple[F32, F32 | None]]


@dataclass(frozen=True)
class BaselineUnit:
    """What a baseline's module exports as ``BASELINE``.

    A unit has at least one of ``fit``, ``embed`` and ``answer``. One with ``embed`` alone labels
    cells by the vote of the nearest training cells in its embedding.

    Attributes:
        name: equals the module's name.
        config: its configuration class; ``config()`` gives the defaults.
        seed_scope: what a seed changes; "" says nothing at all: on one fixed split its spread
            over seeds is then not 0 but not applicable.
        title: what it does, in a few words.
        fit: (config, counts (N, G) raw float32 csr, labels (N,) int64 codes, seed) -> predictor;
            sees training cells only.
        embed: see :data:`Embed`; what is fitted is fitted on the first cells alone, unless
            ``transductive``.
        answer: (config, training cells, labels, asked cells, seed) -> answer: of controls that
            look at batches, or at nothing.
        tell: (config, labels (N,), seed) -> (N, D): an embedding made of the true labels, of the
            positive control alone.
        transductive: sees the counts of test cells (never their labels) when it is fitted.
        needs_batches: cannot run on cells of one batch.
        requires: modules of an optional extra.
        extra: the extra's name.
        family: ``control`` for what only frames the table.
        control: ``negative`` for what no method may fall below unflagged, ``positive`` for what
            none may surpass.
        trials: (config) -> configurations it chooses among on training cells.
    """

    name: str
    config: type[BaselineConfig]
    seed_scope: str
    title: str
    fit: Callable[[Any, sparse.csr_matrix, I64, int], Predictor] | None = None
    embed: Embed | None = None
    answer: Callable[[Any, CellCounts, I64, CellCounts, int], Labelled] | None = None
    tell: Callable[[Any, I64, int], F32] | None = None
    transductive: bool = False
    needs_batches: bool = False
    requires: tuple[str, ...] = ()
    extra: str = ""
    family: Literal["baseline", "control"] = "baseline"
    control: Literal["", "negative", "positive"] = ""
    trials: Callable[[Any], int] = _one


def baseline(name: str) -> BaselineUnit:
    """Find a baseline by its key or by ``module.path:BASELINE``.

    Raises:
        ConfigError: there is none.
    """
    found = registry.find("cellray.baselines", name, "BASELINE")
    assert isinstance(found, BaselineUnit), f"{name} exports a {type(found).__name__} as BASELINE"
    return found


def check_available(unit: BaselineUnit) -> None:
    """Refuse a baseline whose optional package is not installed.

    Raises:
        ConfigError: names the package and the command that installs it.
    """
    missing = [name for name in unit.requires if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"baseline '{unit.name}' needs the package {', '.join(missing)}, which is not "
            f"installed: pip install 'cellray[{unit.extra}]'"
        )


def annotate_with(
    unit: BaselineUnit, config: Any, train: CellCounts, labels: I64, query: CellCounts, seed: int
) -> Labelled:
    """Have any baseline label cells.

    Args:
        unit: the baseline.
        config: its configuration.
        train: N training cells.
        labels: (N,) their class codes.
        query: the cells to label, over the same genes.
        seed: of whatever it draws.

    Raises:
        ConfigError: the baseline gives no labels.
        DataError: cells that it cannot use.
    """
    check_training(train.counts, labels)
    check_genes(query.counts, train.counts.shape[1])
    if unit.answer is not None:
        return unit.answer(config, train, labels, query, seed)
    if unit.fit is not None:
        return unit.fit(config, train.counts, labels, seed).label(query.counts)
    if unit.embed is None:
        raise ConfigError(f"baseline '{unit.name}' gives no labels; leave it out of this task")
    reference, asked = unit.embed(config, train, query, seed)
    assert asked is not None
    codes, confidence = vote_of_nearest(reference, labels, asked, NUM_NEIGHBORS)
    return Labelled(codes, confidence, asked)


def vote_of_nearest(reference: F32, labels: I64, asked: F32, k: int) -> tuple[I64, F64]:
    """Majority of the ``k`` nearest reference cells (L2) and its share; ties to the nearest.

    Args:
        reference: (N, D).
        labels: (N,) class codes.
        asked: (Q, D).
        k: neighbours; all N if there are fewer.
    """
    index = NearestNeighbors(n_neighbors=min(k, len(reference))).fit(reference)
    if not len(asked):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float64)
    return vote(labels[index.kneighbors(asked, return_distance=False)])


def embed_with(
    unit: BaselineUnit, config: Any, cells: CellCounts, seed: int, *, labels: I64 | None = None
) -> F32:
    """Have any baseline embed cells, (N, D).

    Args:
        unit: the baseline.
        config: its configuration.
        cells: N cells.
        seed: of whatever it draws.
        labels: (N,) codes of the truth, looked at by the positive control alone.

    Raises:
        ConfigError: the baseline has no embedding.
        DataError: cells that it cannot use.
    """
    if unit.tell is not None and labels is not None:
        return unit.tell(config, labels, seed)
    if unit.embed is None:
        raise ConfigError(f"baseline '{unit.name}' has no embedding; leave it out of this task")
    check_genes(cells.counts, cells.counts.shape[1])
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
