"""Annotation scores of each query batch apart: a good mean may hide a batch that fails.

Macro-F1 is over the classes of the batch's own truth (``macro_f1.test.v1`` of its cells alone): a
batch is not charged for classes it does not have. Batches are numbered by their sorted names; above
20 of them only mean and least are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cellray.core.errors import DataError
from cellray.metrics.base import Labels, Metric, by_id, label_texts
from cellray.metrics.classification import score_annotation

__all__ = ["METRICS", "MOST_BATCHES", "score_by_batch"]

MOST_BATCHES = 20

METRICS: Mapping[str, Metric] = by_id(
    Metric("macro_f1_test.batch_mean.v1", "macro F1 (batch mean)", "mean over query batches"),
    Metric("macro_f1_test.batch_min.v1", "macro F1 (worst batch)", "least of the query batches"),
    Metric("n_query_batches", "query batches", "batches that labels were transferred to", None),
    *(
        Metric(
            f"macro_f1_test.batch_{number:02d}.v1",
            f"macro F1 (batch {number})",
            f"of query batch {number} in the order of their names, over its own classes",
        )
        for number in range(1, MOST_BATCHES + 1)
    ),
    *(
        Metric(
            f"n_batch_{number:02d}_cells",
            f"cells of batch {number}",
            f"scored cells of query batch {number} in the order of their names",
            None,
        )
        for number in range(1, MOST_BATCHES + 1)
    ),
)


def score_by_batch(
    truth: Labels, predicted: Labels, batches: Labels, *, train_classes: Sequence[str]
) -> dict[str, float]:
    """Macro-F1 of every query batch in turn, their mean and the least.

    Args:
        truth: N true labels.
        predicted: N predicted labels, all from ``train_classes``.
        batches: N batches.
        train_classes: the classes of the reference cells.

    Returns:
        id -> value.

    Raises:
        DataError: lengths differ, a label or batch is missing, nothing to score, or a prediction
            outside ``train_classes``.
    """
    true, guess = label_texts(truth, "true"), label_texts(predicted, "predicted")
    where = label_texts(batches, "batch")
    if not len(true) == len(guess) == len(where):
        raise DataError(
            f"{len(true)} true labels, {len(guess)} predictions and {len(where)} batches; give one "
            "of each per cell"
        )
    names = sorted(set(where))
    if not names:
        raise DataError("no cell to score: the test set is empty")
    scores: dict[str, float] = {}
    each = []
    for number, name in enumerate(names, start=1):
        inside = where == name
        found = score_annotation(true[inside], guess[inside], train_classes=train_classes)
        each.append(found["macro_f1.test.v1"])
        if len(names) <= MOST_BATCHES:
            scores[f"macro_f1_test.batch_{number:02d}.v1"] = each[-1]
            scores[f"n_batch_{number:02d}_cells"] = float(inside.sum())
    return {
        "macro_f1_test.batch_mean.v1": float(np.mean(each)),
        "macro_f1_test.batch_min.v1": float(np.min(each)),
        "n_query_batches": float(len(names)),
        **scores,
    }
