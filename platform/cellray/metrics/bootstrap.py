"""Confidence intervals by resampling whole units (donors), never single cells.

Cells of one donor are not independent, so a resample draws donors with replacement and takes all
cells of each as often as it was drawn. A score that follows from the confusion matrix is computed
from the sum of the drawn donors' matrices: 1,000 resamples then cost a matrix product.

Legend: N cells, U units, C classes, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from cellray.core.draw import Draw
from cellray.core.errors import DataError, did_you_mean
from cellray.metrics.base import Labels, encode_labels, label_texts

__all__ = ["MATRIX_SCORES", "UnitInterval", "bootstrap_units", "draw_units"]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Score = Callable[[Labels, Labels], float]

_CHUNK_VALUES = 1 << 24  # values of the resampled matrices held at a time
_ENOUGH_UNITS = 5


@dataclass(frozen=True)
class UnitInterval:
    """A score and its percentile interval over resampled units.

    Attributes:
        value: of all cells.
        ci95_low: 2.5th percentile over resamples; NaN with fewer than two units.
        ci95_high: 97.5th percentile.
        num_units: units that could be drawn.
        num_draws: resamples whose score exists.
        remark: what a reader must know of the interval, "" if nothing.
    """

    value: float
    ci95_low: float
    ci95_high: float
    num_units: int
    num_draws: int
    remark: str = ""


def _ratio(part: F64, whole: F64) -> F64:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _mean_over(values: F64, where: npt.NDArray[np.bool_]) -> F64:
    return np.asarray((values * where).sum(axis=1) / where.sum(axis=1))


def _parts(matrices: F64) -> tuple[F64, F64, F64]:
    """Correct, true and predicted cells of each class: (B, C) each."""
    return np.einsum("bcc->bc", matrices), matrices.sum(axis=2), matrices.sum(axis=1)


def _f1(matrices: F64) -> F64:
    correct, support, predicted = _parts(matrices)
    return _ratio(2 * correct, support + predicted)


def _macro_precision_union(matrices: F64) -> F64:
    correct, support, predicted = _parts(matrices)
    return _mean_over(_ratio(correct, predicted), support + predicted > 0)


def _macro_precision_test(matrices: F64) -> F64:
    correct, support, predicted = _parts(matrices)
    return _mean_over(_ratio(correct, predicted), support > 0)


def _macro_recall_union(matrices: F64) -> F64:
    correct, support, predicted = _parts(matrices)
    return _mean_over(_ratio(correct, support), support + predicted > 0)


def _accuracy(matrices: F64) -> F64:
    correct, support, _ = _parts(matrices)
    return np.asarray(correct.sum(axis=1) / support.sum(axis=1))


def _macro_f1_union(matrices: F64) -> F64:
    _, support, predicted = _parts(matrices)
    return _mean_over(_f1(matrices), support + predicted > 0)


def _macro_f1_test(matrices: F64) -> F64:
    _, support, _ = _parts(matrices)
    return _mean_over(_f1(matrices), support > 0)


def _weighted_f1(matrices: F64) -> F64:
    _, support, _ = _parts(matrices)
    return np.asarray((_f1(matrices) * support).sum(axis=1) / support.sum(axis=1))


def _balanced_accuracy(matrices: F64) -> F64:
    correct, support, _ = _parts(matrices)
    return _mean_over(_ratio(correct, support), support > 0)


# Metric ids that follow from confusion matrices (B, C, C) of rows true, columns predicted.
MATRIX_SCORES: Mapping[str, Callable[[F64], F64]] = MappingProxyType(
    {
        "accuracy.v1": _accuracy,
        "macro_precision.union.v1": _macro_precision_union,
        "macro_recall.union.v1": _macro_recall_union,
        "macro_f1.union.v1": _macro_f1_union,
        "macro_precision.test.v1": _macro_precision_test,
        "macro_f1.test.v1": _macro_f1_test,
        "weighted_f1.v1": _weighted_f1,
        "balanced_accuracy.v1": _balanced_accuracy,
    }
)


def draw_units(num_units: int, draws: int, seed: int) -> I64:
    """How often each unit is in each resample: (B, U) int64, each row summing to U."""
    uniform = Draw(seed).uniform(
        "bootstrap", np.arange(draws)[:, None], np.arange(num_units)[None, :]
    )
    drawn = (uniform * num_units).astype(np.int64)
    flat = drawn + num_units * np.arange(draws)[:, None]
    return np.bincount(flat.ravel(), minlength=draws * num_units).reshape(draws, num_units)


def bootstrap_units(
    truth: Labels,
    predicted: Labels,
    units: Labels,
    score: str | Score,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> UnitInterval:
    """A score with a 95 % percentile interval over resampled units.

    Each resample is scored as a data set of its own: a class whose donors were not drawn is not
    in it.

    Args:
        truth: N true labels.
        predicted: N predicted labels.
        units: N names of what is resampled whole, e.g. donors.
        score: an id of :data:`MATRIX_SCORES`, or a function of (truth, predicted), which is called
            once a resample; a resample for which it gives NaN is left out.
        draws: resamples, B.
        seed: the resamples follow from it.

    Raises:
        DataError: an id that does not follow from the confusion matrix, lengths differ, a label is
            missing, there is no cell, or no resample could be scored.
    """
    codes, names = encode_labels(units, "unit")
    if len(codes) != len(truth) or len(truth) != len(predicted):
        raise DataError(
            f"{len(truth)} true labels, {len(predicted)} predictions and {len(codes)} units; give "
            "one of each for every cell"
        )
    if draws < 2:
        raise DataError(f"draws = {draws}: an interval needs at least 2 resamples, better 1,000")
    weights = draw_units(len(names), draws, seed)
    if isinstance(score, str):
        if score not in MATRIX_SCORES:
            raise DataError(
                f"'{score}' does not follow from a confusion matrix."
                f"{did_you_mean(score, MATRIX_SCORES)} Those that do: {', '.join(MATRIX_SCORES)}; "
                "give a function of (truth, predicted) for any other"
            )
        value, values = _by_matrices(truth, predicted, codes, weights, MATRIX_SCORES[score])
    else:
        value, values = _by_calls(truth, predicted, codes, weights, score)
    there = values[np.isfinite(values)]
    if not len(there):
        raise DataError(f"the score is not a number in any of {draws} resamples")
    if len(names) < 2:
        remark = "one unit only: no interval over units exists"
        return UnitInterval(value, np.nan, np.nan, len(names), 0, remark)
    low, high = np.quantile(there, [0.025, 0.975])
    remark = (
        f"only {len(names)} units: the interval is too narrow to be trusted"
        if len(names) < _ENOUGH_UNITS
        else ""
    )
    return UnitInterval(value, float(low), float(high), len(names), len(there), remark)


def _by_matrices(
    truth: Labels, predicted: Labels, codes: I64, weights: I64, score: Callable[[F64], F64]
) -> tuple[float, F64]:
    """The score of all cells and of every resample, from one confusion matrix a unit."""
    true, guess = label_texts(truth, "true"), label_texts(predicted, "predicted")
    place = {name: i for i, name in enumerate(sorted({*true, *guess}))}
    size, num_units = len(place), weights.shape[1]
    flat = np.array([place[t] * size + place[g] for t, g in zip(true, guess, strict=True)])
    pairs, pair_of = np.unique(flat, return_inverse=True)
    counts = np.bincount(codes * len(pairs) + pair_of, minlength=num_units * len(pairs))
    per_unit = counts.reshape(num_units, len(pairs)).astype(np.float64)
    values = []
    step = max(1, _CHUNK_VALUES // size**2)
    for first in range(0, len(weights), step):
        part = weights[first : first + step]
        matrices = np.zeros((len(part), size * size))
        matrices[:, pairs] = part @ per_unit
        values.append(score(matrices.reshape(-1, size, size)))
    whole = np.zeros((1, size * size))
    whole[0, pairs] = per_unit.sum(axis=0)
    return float(score(whole.reshape(1, size, size))[0]), np.concatenate(values)


def _by_calls(
    truth: Labels, predicted: Labels, codes: I64, weights: I64, score: Score
) -> tuple[float, F64]:
    """The score of all cells and of every resample, by calling it on the drawn cells."""
    true, guess = np.asarray(truth, dtype=object), np.asarray(predicted, dtype=object)
    values = np.empty(len(weights))
    for i, times in enumerate(weights):
        rows = np.repeat(np.arange(len(codes)), times[codes])
        values[i] = score(true[rows], guess[rows])
    return float(score(true, guess)), values
