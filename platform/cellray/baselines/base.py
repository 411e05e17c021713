"""What a baseline is: a cheap method fitted on raw counts, run beside every model.

Legend: N cells, G genes, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy import sparse

from cellray.core import registry
from cellray.core.errors import DataError
from cellray.core.section import Section

__all__ = [
    "BaselineConfig",
    "BaselineUnit",
    "Predictor",
    "baseline",
    "check_genes",
    "check_training",
]

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]


class BaselineConfig(Section):
    """Keys every baseline has; each adds its own in its own file.

    Attributes:
        name: the baseline's module name.
    """

    name: str


class Predictor(Protocol):
    """A fitted baseline: a pure function of a cell's counts, one cell at a time or many."""

    def predict(self, counts: sparse.csr_matrix) -> I64:
        """Class codes (N,) of the cells of ``counts`` (N, G)."""
        ...

    def embed(self, counts: sparse.csr_matrix) -> F32 | None:
        """The space it decides in, (N, D); None if it has none."""
        ...


@dataclass(frozen=True)
class BaselineUnit:
    """What a baseline's module exports as ``BASELINE``.

    Attributes:
        name: equals the module's name.
        config: its configuration class; ``config()`` gives the defaults.
        fit: (config, counts (N, G) raw float32 csr, labels (N,) int64 codes, seed) -> predictor;
            sees training cells only.
        seed_scope: what a seed changes; "" says nothing at all: on one fixed split its spread
            over seeds is then not 0 but not applicable.
        title: what it does, in a few words.
    """

    name: str
    config: type[BaselineConfig]
    fit: Callable[[Any, sparse.csr_matrix, I64, int], Predictor]
    seed_scope: str
    title: str


def baseline(name: str) -> BaselineUnit:
    """Find a baseline by its key or by ``module.path:BASELINE``.

    Raises:
        ConfigError: there is none.
    """
    found = registry.find("cellray.baselines", name, "BASELINE")
    assert isinstance(found, BaselineUnit), f"{name} exports a {type(found).__name__} as BASELINE"
    return found


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
