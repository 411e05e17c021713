"""Probes of a frozen embedding: how well simple classifiers read the labels off it.

The protocol of cz-benchmarks: classes of fewer than 10 cells are dropped first, five stratified
folds with one fixed seed, each classifier behind a scaling to unit variance without centring, and a
metric is the mean over folds. The folds depend on the labels alone, so every method of a table is
probed on the same cells, and a method that predicts labels itself (a majority vote, a regression on
genes) is scored by the same folds with :func:`probe_labels`.

- kNN probe: the vote of the 5 nearest training cells.
- linear probe: L2 logistic regression, C = 1.

Legend: N cells, D dimensions, K kept cells.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cellray.core.errors import DataError
from cellray.metrics.base import Labels, Metric, by_id, encode_labels, label_texts
from cellray.metrics.classification import score_annotation
from cellray.metrics.neighbours import finite_matrix

__all__ = [
    "METRICS",
    "MIN_CLASS_CELLS",
    "NUM_FOLDS",
    "PROBE_SEED",
    "ProbeFolds",
    "probe_embedding",
    "probe_folds",
    "probe_labels",
    "scored_rows",
]

I64 = npt.NDArray[np.int64]
Probe = Literal["knn", "linear"]
# (rows to learn from, rows to predict) -> predicted labels of the latter; rows are of the N cells.
Predict = Callable[[I64, I64], Labels]

NUM_FOLDS = 5
MIN_CLASS_CELLS = 10
PROBE_SEED = 42
MOST_CELLS = 20_000
_NEIGHBOURS = 5
_MAX_ITERATIONS = 1000

METRICS: Mapping[str, Metric] = by_id(
    *(
        Metric(
            f"{measure}.{probe}_probe.v1",
            f"{title} ({short} probe)",
            f"{title} of {what}, mean of {NUM_FOLDS} stratified folds (seed {PROBE_SEED}), classes "
            f"under {MIN_CLASS_CELLS} cells dropped",
        )
        for probe, short, what in (
            ("knn", "kNN", f"{_NEIGHBOURS} nearest cells' votes on the scaled embedding"),
            ("linear", "linear", "a logistic regression on the scaled embedding"),
        )
        for measure, title in (("accuracy", "accuracy"), ("macro_f1", "macro F1"))
    ),
    Metric("n_probe_cells", "probe cells", "cells in the probes' folds", None),
    Metric("n_probe_classes", "probe classes", "classes in the probes' folds", None),
    Metric(
        "n_probe_dropped_cells",
        "dropped cells",
        f"cells of classes under {MIN_CLASS_CELLS} cells, which no probe looks at",
        None,
    ),
    Metric(
        "n_probe_dropped_classes",
        "dropped classes",
        f"classes under {MIN_CLASS_CELLS} cells, which no probe looks at",
        None,
    ),
    Metric(
        "n_scored_cells",
        "scored cells",
        f"labelled cells that an embedding is scored on: all, or above {MOST_CELLS:,} of them a "
        f"stratified subsample of that size with seed {PROBE_SEED}",
        None,
    ),
)


@dataclass(frozen=True)
class ProbeFolds:
    """Which cells are probed, and in which fold each is predicted.

    Attributes:
        dropped_cells: cells of classes that are too small.
        dropped_classes: how many such classes there are.

    Shapes:
        rows: (K,) ascending rows of the N cells.
        fold: (K,) 0 to 4.
        labels: (K,) label texts.
    """

    rows: I64
    fold: I64
    labels: npt.NDArray[np.object_]
    dropped_cells: int
    dropped_classes: int

    @property
    def counts(self) -> dict[str, float]:
        """What a table says of the folds, by metric id."""
        return {
            "n_probe_cells": float(len(self.rows)),
            "n_probe_classes": float(len(set(self.labels))),
            "n_probe_dropped_cells": float(self.dropped_cells),
            "n_probe_dropped_classes": float(self.dropped_classes),
        }


def scored_rows(labels: Labels, *, most: int = MOST_CELLS, seed: int = PROBE_SEED) -> I64:
    """Rows an embedding is scored on: all, or a subsample with each label's share of ``most``.

    Shares are rounded by largest remainder, and every label keeps one cell at least (the largest
    ones give way), so that exactly ``most`` rows come back.

    Args:
        labels: N labels.
        most: rows at most; at least the number of labels.
        seed: of the draw.

    Returns:
        Ascending (N,) or (most,) int64.

    Raises:
        DataError: a label is missing, or there are more labels than rows.
    """
    codes, names = encode_labels(labels, "cell")
    if len(codes) <= most:
        return np.arange(len(codes), dtype=np.int64)
    if len(names) > most:
        raise DataError(f"{len(names)} labels do not fit into a subsample of {most} cells")
    sizes = np.bincount(codes)
    exact = sizes * (most / len(codes))
    wanted = np.maximum(np.floor(exact).astype(np.int64), 1)
    while wanted.sum() > most:
        wanted[np.argmax(wanted)] -= 1
    behind = np.argsort(wanted - exact, kind="stable")
    wanted[behind[: most - int(wanted.sum())]] += 1
    generator = np.random.default_rng(seed)
    parts = [
        generator.choice(np.flatnonzero(codes == code), size=int(count), replace=False)
        for code, count in enumerate(wanted)
    ]
    return np.sort(np.concatenate(parts)).astype(np.int64)


def probe_folds(labels: Labels) -> ProbeFolds:
    """Drop small classes and deal the other cells to five stratified folds.

    The same labels in the same order give the same folds: give cells in ascending id order.

    Args:
        labels: N labels.

    Raises:
        DataError: a label is missing, or fewer than two classes have 10 cells.
    """
    texts = label_texts(labels, "cell")
    names, codes, sizes = np.unique(texts.astype(str), return_inverse=True, return_counts=True)
    small = sizes < MIN_CLASS_CELLS
    rows = np.flatnonzero(~small[codes]).astype(np.int64)
    if (~small).sum() < 2:
        raise DataError(
            f"{int((~small).sum())} of {len(names)} classes have at least {MIN_CLASS_CELLS} cells; "
            "a probe needs two of them"
        )
    fold = np.empty(len(rows), dtype=np.int64)
    splitter = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=PROBE_SEED)
    for number, (_, held_out) in enumerate(splitter.split(rows[:, None], codes[rows])):
        fold[held_out] = number
    return ProbeFolds(rows, fold, texts[rows], int(sizes[small].sum()), int(small.sum()))


def probe_labels(
    folds: ProbeFolds, predict: Predict, *, probe: Probe = "linear"
) -> dict[str, float]:
    """Score a method that predicts labels itself by the probes' folds.

    Args:
        folds: from :func:`probe_folds`.
        predict: learns from the first rows, gives a label for each of the second; called once a
            fold, and it must not look at other rows' labels.
        probe: whose columns the scores stand in: ``linear`` for a regression or a majority vote.

    Returns:
        ``accuracy.<probe>_probe.v1`` and ``macro_f1.<probe>_probe.v1``, means over folds.

    Raises:
        DataError: not one label per row, or a label that the fold's training cells lack.
    """
    found: dict[str, list[float]] = {"accuracy": [], "macro_f1": []}
    for number in range(NUM_FOLDS):
        outside = folds.fold == number
        guess = predict(folds.rows[~outside], folds.rows[outside])
        known = sorted(set(folds.labels[~outside]))
        scores = score_annotation(folds.labels[outside], guess, train_classes=known)
        found["accuracy"].append(scores["accuracy.v1"])
        found["macro_f1"].append(scores["macro_f1.union.v1"])
    return {f"{name}.{probe}_probe.v1": float(np.mean(each)) for name, each in found.items()}


def probe_embedding(embedding: npt.ArrayLike, labels: Labels) -> dict[str, float]:
    """Both probes of an embedding, and what was dropped.

    Args:
        embedding: (N, D) finite.
        labels: N labels, in ascending order of the cells' ids.

    Returns:
        id -> value.

    Raises:
        DataError: the embedding is not finite, lengths differ, or as in :func:`probe_folds`.
    """
    points = finite_matrix(embedding)
    if len(labels) != len(points):
        raise DataError(f"{len(points)} cells in the embedding but {len(labels)} labels")
    texts = label_texts(labels, "cell")
    digest = hashlib.sha256(points.tobytes())
    digest.update("\0".join(texts.astype(str)).encode())
    key = (points.shape, points.dtype.str + digest.hexdigest())
    if key not in _probed:  # the seeds of a table ask the same of a frozen embedding
        found = _probe(points, texts)
        _probed.clear()
        _probed[key] = found
    return dict(_probed[key])


_probed: dict[tuple[tuple[int, ...], str], dict[str, float]] = {}


def _probe(points: npt.NDArray[Any], texts: npt.NDArray[np.object_]) -> dict[str, float]:
    folds = probe_folds(texts)
    scores: dict[str, float] = {}
    for probe in ("knn", "linear"):

        def predict(inside: I64, outside: I64, probe: str = probe) -> Labels:
            head = (
                KNeighborsClassifier(_NEIGHBOURS)
                if probe == "knn"
                else LogisticRegression(max_iter=_MAX_ITERATIONS)
            )
            model = make_pipeline(StandardScaler(with_mean=False), head)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(points[inside], texts[inside].astype(str))
            return np.asarray(model.predict(points[outside]))

        scores |= probe_labels(folds, predict, probe=probe)
    return scores | folds.counts
