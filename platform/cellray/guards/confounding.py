"""Labels that a batch, a donor or a covariate gives away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cellray.core.errors import DataError
from cellray.metrics.base import Labels
from cellray.metrics.confounding import contingency, cramers_v

__all__ = [
    "CONFOUNDED",
    "Confounding",
    "check_covariates",
    "confounding",
    "confounding_warnings",
]

CONFOUNDED = 0.5  # Cramér's V (bias-corrected) from which a batch is called confounded
_GIVEN_AWAY = 0.9  # V from which, with the purity below, a covariate is the label
_PURE = 0.99
_LISTED = 6
_FEWEST_CELLS = 10  # a class of fewer cells is in one batch by chance


@dataclass(frozen=True)
class Confounding:
    """How far a column says which label a cell has.

    Attributes:
        column: the column.
        cramers_v: of label and column, ``cramers_v.bergsma.v1``.
        purity: share of cells whose label is the most frequent one of their value of the column.
        majority: share of the most frequent label of all: the purity of a column that says nothing.
        single: class of at least 10 cells -> the one value of the column that has it.
        values: distinct values of the column.
    """

    column: str
    cramers_v: float
    purity: float
    majority: float
    single: Mapping[str, str]
    values: int


def confounding(labels: Labels, columns: Mapping[str, Labels]) -> list[Confounding]:
    """The association of labels with each column, the strongest first.

    Args:
        labels: N labels.
        columns: name -> N values of the same cells; columns of one value are passed over.

    Raises:
        DataError: a value is missing, or lengths differ.
    """
    found = []
    for name, values in columns.items():
        table, classes, levels = contingency(labels, values)
        if len(levels) < 2:
            continue
        total = table.sum()
        large = table.sum(axis=1) >= _FEWEST_CELLS
        alone = large & ((table > 0).sum(axis=1) == 1)
        found.append(
            Confounding(
                column=name,
                cramers_v=cramers_v(table),
                purity=float(table.max(axis=0).sum() / total),
                majority=float(table.sum(axis=1).max() / total),
                single={classes[i]: levels[int(table[i].argmax())] for i in np.flatnonzero(alone)},
                values=len(levels),
            )
        )
    return sorted(found, key=lambda one: -one.cramers_v)


def confounding_warnings(found: Sequence[Confounding], *, label: str) -> list[str]:
    """A sentence for each column whose Cramér's V is at least 0.5, with the pairs that are.

    Args:
        found: from :func:`confounding`.
        label: name of the label column.
    """
    told = []
    for one in found:
        if one.cramers_v < CONFOUNDED:
            continue
        pairs = [f"{name} only in {value}" for name, value in one.single.items()]
        more = f" and {len(pairs) - _LISTED} more" if len(pairs) > _LISTED else ""
        listed = f": {', '.join(pairs[:_LISTED])}{more}" if pairs else ""
        told.append(
            f"'{label}' and '{one.column}' are confounded (Cramér's V {one.cramers_v:.2f}, shown "
            f"from {CONFOUNDED:g}): what separates the labels may be the technical difference"
            f"{listed}"
        )
    return told


def check_covariates(
    found: Sequence[Confounding], covariates: Sequence[str], *, label: str
) -> None:
    """Refuse a covariate that is the label by another name.

    Args:
        found: of the covariates, among others.
        covariates: obs columns that are handed to the model with each cell.
        label: name of the label column.

    Raises:
        DataError: a covariate is the label column, or its value says the label of at least 99 % of
            the cells.
    """
    if label in covariates:
        raise DataError(
            f"data.covariates names '{label}', the label that is to be predicted; leave it out"
        )
    for one in found:
        told = one.purity >= _PURE and one.majority < _PURE
        if one.column in covariates and told and one.cramers_v >= _GIVEN_AWAY:
            raise DataError(
                f"the covariate '{one.column}' gives the label away: its value says "
                f"'{label}' of {one.purity:.1%} of the cells (Cramér's V {one.cramers_v:.2f}); a "
                "model that is told it predicts nothing. Leave it out of data.covariates"
            )
