"""Refusing cells that a method is not sure of: what is gained, and where to draw the line.

Cells are refused from the least confident on. Cells of equal confidence are kept or refused
together, so that every number here is one that a threshold can reach; there are as many steps as
there are distinct confidences. A cell whose class training lacked is wrong wherever it is kept.

Legend: N cells, K steps (distinct confidences), C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from cellray.core.errors import DataError
from cellray.metrics.base import Labels, Metric, by_id, label_texts

__all__ = [
    "COVERAGES",
    "METRICS",
    "CoverageCurve",
    "accuracy_at",
    "choose_threshold",
    "coverage_curve",
    "score_refusal",
    "unknown_auroc",
]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Numbers = Sequence[float] | npt.NDArray[np.floating]

COVERAGES = (50, 80, 90, 95)  # percent, of the ids accuracy_at_coverage_*


def _accuracy_at(percent: int) -> Metric:
    return Metric(
        f"accuracy_at_coverage_{percent}.v1",
        f"accuracy at {percent} % coverage",
        f"accuracy of the most confident cells: the fewest that make up {percent} %, ties together",
    )


METRICS: Mapping[str, Metric] = by_id(
    Metric(
        "aurc.v1",
        "AURC",
        "area under the risk-coverage curve: each cell's step weighs its error rate; 0 is best",
        higher_is_better=False,
    ),
    *(_accuracy_at(percent) for percent in COVERAGES),
    Metric(
        "unknown_auroc.v1",
        "unknown AUROC",
        "how well low confidence tells cells of classes that training lacked from all others",
    ),
    Metric("coverage_kept.v1", "coverage", "share of cells kept at the model's own threshold"),
    Metric("accuracy_kept.v1", "accuracy (kept)", "accuracy of the cells kept at that threshold"),
    Metric("n_refused", "refused cells", "test cells below the model's own threshold", None),
)


@dataclass(frozen=True)
class CoverageCurve:
    """Coverage against score, from the most confident cells alone to all cells.

    Attributes:
        thresholds: (K,) float64 descending: cells of at least this confidence are kept.
        kept: (K,) int64 cells kept.
        coverage: (K,) kept / N.
        accuracy: (K,) right cells / kept cells.
        macro_f1: (K,) mean F1 over the labels in truth or prediction of the kept cells.
    """

    thresholds: F64
    kept: I64
    coverage: F64
    accuracy: F64
    macro_f1: F64

    @property
    def aurc(self) -> float:
        """Mean over cells of the error rate of the step that first keeps them."""
        weights = np.diff(self.coverage, prepend=0.0)
        return float((weights * (1 - self.accuracy)).sum())


def _confidences(confidence: Numbers, num_cells: int) -> F64:
    values = np.asarray(confidence, dtype=np.float64)
    if values.shape != (num_cells,):
        raise DataError(
            f"confidences have shape {values.shape}, but there are {num_cells} cells; give one each"
        )
    if not num_cells:
        raise DataError("no cell to score: the confidences are empty")
    if not np.isfinite(values).all():
        raise DataError(
            f"{int((~np.isfinite(values)).sum())} of {num_cells} confidences are not finite; a "
            "method that gives none for a cell cannot refuse"
        )
    return values


def _steps(confidence: F64) -> tuple[I64, I64]:
    """Order from the most confident on, and (K,) how many cells are kept at each step."""
    order = np.argsort(-confidence, kind="stable")
    ends = np.flatnonzero(np.diff(confidence[order], append=np.nan) != 0) + 1
    return order.astype(np.int64), ends.astype(np.int64)


def coverage_curve(truth: Labels, predicted: Labels, confidence: Numbers) -> CoverageCurve:
    """Accuracy and macro-F1 of the kept cells at every threshold.

    Args:
        truth: N labels.
        predicted: N labels.
        confidence: N numbers; more is surer.

    Raises:
        DataError: lengths differ, a label is missing, a confidence is not finite, or no cell.
    """
    true, guess = label_texts(truth, "true"), label_texts(predicted, "predicted")
    if len(true) != len(guess):
        raise DataError(f"{len(true)} true labels but {len(guess)} predictions; give one each")
    values = _confidences(confidence, len(true))
    order, ends = _steps(values)
    names, codes = np.unique(np.concatenate([true, guess]).astype(str), return_inverse=True)
    true_codes, guess_codes = codes[: len(true)][order], codes[len(true) :][order]
    right = np.cumsum(true_codes == guess_codes)[ends - 1]
    f1_sum, present = np.zeros(len(ends)), np.zeros(len(ends), dtype=np.int64)
    for code in range(len(names)):
        is_true, is_guess = true_codes == code, guess_codes == code
        support = np.cumsum(is_true)[ends - 1]
        either = support + np.cumsum(is_guess)[ends - 1]
        hits = np.cumsum(is_true & is_guess)[ends - 1]
        there = either > 0
        f1_sum[there] += 2 * hits[there] / either[there]
        present += there
    return CoverageCurve(
        thresholds=values[order][ends - 1],
        kept=ends,
        coverage=ends / len(true),
        accuracy=right / ends,
        macro_f1=f1_sum / present,
    )


def accuracy_at(curve: CoverageCurve, coverage: float) -> float:
    """Accuracy at the lowest coverage of the curve that is at least ``coverage`` (0..1)."""
    at = int(np.searchsorted(curve.coverage, coverage * (1 - 1e-12)))
    return float(curve.accuracy[min(at, len(curve.accuracy) - 1)])


def unknown_auroc(confidence: Numbers, unknown: Sequence[bool] | npt.NDArray[np.bool_]) -> float:
    """Probability that a cell of an unknown class is less sure than one of a known class.

    Ties count half. 0.5 says nothing, 1 tells all.

    Args:
        confidence: N numbers.
        unknown: N flags, True where training lacked the cell's class.

    Raises:
        DataError: lengths differ, a confidence is not finite, or one of the two kinds is absent.
    """
    flags = np.asarray(unknown, dtype=bool)
    values = _confidences(confidence, len(flags))
    positives, negatives = int(flags.sum()), int((~flags).sum())
    if not positives or not negatives:
        raise DataError(
            f"{positives} cells of unknown and {negatives} of known classes: an AUROC needs both"
        )
    ranks = rankdata(-values)
    above = ranks[flags].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def choose_threshold(
    confidence: Numbers,
    correct: Sequence[bool] | npt.NDArray[np.bool_],
    *,
    target_accuracy: float | None = None,
    target_coverage: float | None = None,
) -> float:
    """The threshold that keeps most cells at a wanted accuracy, or the surest of a wanted share.

    Give it validation cells only: a threshold chosen on test cells flatters them.

    Args:
        confidence: N confidences of validation cells.
        correct: N flags, whether each is right.
        target_accuracy: the lowest threshold whose kept cells are right at least so often (0..1).
        target_coverage: the highest threshold that keeps at least this share of the cells (0..1).

    Returns:
        Cells below it are refused.

    Raises:
        DataError: both targets or none, lengths differ, no cells, or no threshold reaches the
            accuracy.
    """
    if (target_accuracy is None) == (target_coverage is None):
        raise DataError("give either target_accuracy or target_coverage")
    flags = np.asarray(correct, dtype=bool)
    values = _confidences(confidence, len(flags))
    order, ends = _steps(values)
    thresholds = values[order][ends - 1]
    if target_coverage is not None:
        enough = ends >= target_coverage * len(flags) * (1 - 1e-12)
        return float(thresholds[np.argmax(enough)])
    assert target_accuracy is not None
    accuracy = np.cumsum(flags[order])[ends - 1] / ends
    reached = np.flatnonzero(accuracy >= target_accuracy)
    if not len(reached):
        raise DataError(
            f"no threshold reaches an accuracy of {target_accuracy:g} on the {len(flags)} "
            f"validation cells: the surest are right at {accuracy.max():.3f}; lower the target, or "
            "train longer"
        )
    return float(thresholds[reached[-1]])


def score_refusal(
    truth: Labels,
    predicted: Labels,
    confidence: Numbers,
    *,
    train_classes: Sequence[str],
    threshold: float = 0.0,
) -> dict[str, float]:
    """All metrics of this module for one set of predictions, by versioned id.

    ``unknown_auroc.v1`` is left out where no test cell, or every one, is of a class that training
    lacked, and ``accuracy_kept.v1`` where no cell is kept.

    Args:
        truth: N labels.
        predicted: N labels, nothing refused among them.
        confidence: N numbers.
        train_classes: the classes of the training cells.
        threshold: cells below it are refused.

    Raises:
        DataError: as in :func:`coverage_curve`.
    """
    curve = coverage_curve(truth, predicted, confidence)
    values = np.asarray(confidence, dtype=np.float64)
    true, guess = label_texts(truth, "true"), label_texts(predicted, "predicted")
    unknown = ~np.isin(true.astype(str), [str(name) for name in train_classes])
    kept = values >= threshold
    found = {"aurc.v1": curve.aurc}
    for percent in COVERAGES:
        found[f"accuracy_at_coverage_{percent}.v1"] = accuracy_at(curve, percent / 100)
    if unknown.any() and not unknown.all():
        found["unknown_auroc.v1"] = unknown_auroc(values, unknown)
    found["coverage_kept.v1"] = float(kept.mean())
    if kept.any():
        found["accuracy_kept.v1"] = float((true == guess)[kept].mean())
    found["n_refused"] = float((~kept).sum())
    return found
