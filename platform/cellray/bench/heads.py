"""What turns a frozen embedding into labels: a logistic regression, or the nearest cells' vote.

Fitted on training cells alone. Legend: N training cells, Q asked cells, D width, C classes.
"""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from cellray.baselines._features import one_thread
from cellray.baselines._vote import neighbour_vote
from cellray.baselines.base import Labelled
from cellray.baselines.logistic import inner_folds

__all__ = ["HEAD_TRIALS", "logistic_head", "neighbour_head"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

_STRENGTHS = (0.01, 0.1, 1.0, 10.0)
_FOLDS = 3
_ITERATIONS = 300
HEAD_TRIALS = len(_STRENGTHS)  # configurations the head's inner folds choose among


def _model(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_ITERATIONS))


def _strength(points: F32, labels: I64, seed: int) -> float:
    """C with the best macro-F1 on inner folds; the stronger penalty of equals."""
    if len(labels) < _FOLDS * 2:
        return 1.0
    fold = inner_folds(labels, folds=_FOLDS, seed=seed)
    scores = []
    for strength in _STRENGTHS:
        guessed = np.empty(len(labels), dtype=np.int64)
        for held_out in range(_FOLDS):
            inside = fold != held_out
            if len(np.unique(labels[inside])) < 2:
                guessed[~inside] = labels[inside][0]
                continue
            fitted = _model(strength).fit(points[inside], labels[inside])
            guessed[~inside] = fitted.predict(points[~inside])
        scores.append(f1_score(labels, guessed, average="macro", zero_division=0))
    return _STRENGTHS[int(np.argmax(scores))]


def logistic_head(points: F32, labels: I64, asked: F32, *, seed: int) -> Labelled:
    """L2 logistic regression on standardised embeddings, its strength chosen by inner folds.

    Args:
        points: (N, D) training cells.
        labels: (N,) class codes.
        asked: (Q, D).
        seed: deals the folds.
    """
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = _model(_strength(points, labels, seed)).fit(points, labels)
        shares = fitted.predict_proba(asked)
    best = shares.argmax(axis=1)
    return Labelled(
        codes=np.asarray(fitted.classes_[best], dtype=np.int64),
        confidence=np.asarray(shares.max(axis=1), dtype=np.float64),
        embedding=asked,
    )


def neighbour_head(points: F32, labels: I64, asked: F32, *, k: int) -> Labelled:
    """The vote of the ``k`` nearest training cells (L2), confidence their share."""
    codes, confidence = neighbour_vote(points, labels, asked, k)
    return Labelled(codes=codes, confidence=confidence, embedding=asked)
