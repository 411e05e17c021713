"""Classification metrics with an explicit label set: labels in, floats out.

The trap this module is built around: a macro average depends on which classes it is over. With
the *union* of the labels in truth and prediction (scikit-learn's default, and what papers print)
one cell predicted as a class that the test set lacks adds a class with F1 = 0; with the *test*
label set it does not. Both are given, and every id says which it is.

Legend: N cells, C classes. A ratio 0/0 counts as 0, as in scikit-learn with ``zero_division=0``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellray.core.errors import DataError
from cellray.metrics.base import Labels, Metric, by_id, label_texts

__all__ = [
    "METRICS",
    "ClassScores",
    "Metric",
    "confusion_matrix",
    "score_annotation",
]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

METRICS: Mapping[str, Metric] = by_id(
    Metric("accuracy.v1", "accuracy", "correct cells / all cells"),
    Metric("macro_precision.union.v1", "macro P (union)", "mean precision over the union"),
    Metric("macro_recall.union.v1", "macro R (union)", "mean recall over the union"),
    Metric("macro_f1.union.v1", "macro F1 (union)", "mean F1 over labels in truth or prediction"),
    Metric("macro_precision.test.v1", "macro P (test)", "mean precision over test classes"),
    Metric("macro_f1.test.v1", "macro F1 (test)", "mean F1 over the classes of the test truth"),
    Metric("weighted_f1.v1", "weighted F1", "F1 weighted by the cells of each true class"),
    Metric("balanced_accuracy.v1", "balanced accuracy", "mean recall over test classes"),
    Metric("n_train_classes", "train classes", "classes the method could predict", None),
    Metric("n_test_classes", "test classes", "classes in the test truth", None),
    Metric("n_unseen_classes", "unseen classes", "test classes not in training", None),
    Metric("n_unseen_cells", "unseen cells", "test cells of such classes: always wrong", None),
    Metric("n_items", "cells", "cells that were scored", None),
)


@dataclass(frozen=True)
class ClassScores:
    """Per-class results.

    Shapes:
        classes: (C,) names.
        precision, recall, f1: (C,) float64 in 0..1.
        support: (C,) int64 cells whose true class it is.
        predicted: (C,) int64 cells predicted as it.
    """

    classes: tuple[str, ...]
    precision: F64
    recall: F64
    f1: F64
    support: I64
    predicted: I64


def _pair(
    truth: Labels, predicted: Labels
) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.object_]]:
    true, guess = label_texts(truth, "true"), label_texts(predicted, "predicted")
    if len(true) != len(guess):
        raise DataError(f"{len(true)} true labels but {len(guess)} predictions; give one each")
    if not len(true):
        raise DataError("no cell to score: the test set is empty")
    return true, guess


def confusion_matrix(
    truth: Labels, predicted: Labels, *, classes: Sequence[str] | None = None
) -> tuple[I64, tuple[str, ...]]:
    """Count cells by (true class, predicted class).

    Args:
        truth: N labels.
        predicted: N labels.
        classes: rows and columns; by default the sorted union of both.

    Returns:
        (C, C) int64, rows true and columns predicted, and the class names.

    Raises:
        DataError: lengths differ, a label is missing, nothing to score, or a label outside
            ``classes``.
    """
    true, guess = _pair(truth, predicted)
    found = sorted(set(true) | set(guess))
    names = tuple(found if classes is None else classes)
    position = {name: i for i, name in enumerate(names)}
    extra = [name for name in found if name not in position]
    if extra:
        raise DataError(f"labels outside the given classes: {', '.join(extra[:5])}")
    rows = np.array([position[t] for t in true], dtype=np.int64)
    columns = np.array([position[g] for g in guess], dtype=np.int64)
    flat = np.bincount(rows * len(names) + columns, minlength=len(names) ** 2)
    return flat.reshape(len(names), len(names)).astype(np.int64), names


def _ratio(part: npt.NDArray[np.integer], whole: npt.NDArray[np.integer]) -> F64:
    result = np.zeros(len(part), dtype=np.float64)
    np.divide(part, whole, out=result, where=whole > 0)
    return result


def _scores(matrix: I64, names: tuple[str, ...]) -> ClassScores:
    correct = np.diag(matrix)
    support, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
    return ClassScores(
        classes=names,
        precision=_ratio(correct, predicted),
        recall=_ratio(correct, support),
        f1=_ratio(2 * correct, support + predicted),
        support=support,
        predicted=predicted,
    )


def score_annotation(
    truth: Labels, predicted: Labels, *, train_classes: Sequence[str]
) -> dict[str, float]:
    """All annotation metrics of one set of predictions, by versioned id (see :data:`METRICS`).

    A test class that training lacked cannot be predicted; its cells stay in every denominator and
    count as wrong, and ``n_unseen_classes`` and ``n_unseen_cells`` say how many there are.

    Args:
        truth: N true labels.
        predicted: N predicted labels, all from ``train_classes``.
        train_classes: the classes of the training cells.

    Returns:
        id -> value; counts are whole floats.

    Raises:
        DataError: lengths differ, a label is missing, nothing to score, or a prediction outside
            ``train_classes``.
    """
    matrix, names = confusion_matrix(truth, predicted)
    by_class = _scores(matrix, names)
    known = {str(c) for c in train_classes}
    alien = [n for n, k in zip(names, by_class.predicted, strict=True) if k and n not in known]
    if alien:
        raise DataError(
            f"predictions hold classes that training lacked: {', '.join(alien[:5])}; the class "
            "list must come from training cells alone"
        )
    total = int(matrix.sum())
    in_test = by_class.support > 0
    unseen = in_test & np.array([n not in known for n in names])
    return {
        "accuracy.v1": float(np.trace(matrix) / total),
        "macro_precision.union.v1": float(by_class.precision.mean()),
        "macro_recall.union.v1": float(by_class.recall.mean()),
        "macro_f1.union.v1": float(by_class.f1.mean()),
        "macro_precision.test.v1": float(by_class.precision[in_test].mean()),
        "macro_f1.test.v1": float(by_class.f1[in_test].mean()),
        "weighted_f1.v1": float((by_class.f1 * by_class.support).sum() / total),
        "balanced_accuracy.v1": float(by_class.recall[in_test].mean()),
        "n_train_classes": float(len(known)),
        "n_test_classes": float(in_test.sum()),
        "n_unseen_classes": float(unseen.sum()),
        "n_unseen_cells": float(by_class.support[unseen].sum()),
        "n_items": float(total),
    }
