"""Scores of each query batch apart, against scikit-learn on that batch's cells."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from cellray.core.errors import DataError
from cellray.metrics.base import metric
from cellray.metrics.by_batch import MOST_BATCHES, score_by_batch


def test_each_batch_is_scored_over_its_own_classes() -> None:
    rng = np.random.default_rng(0)
    truth = rng.choice(["a", "b", "c"], 300)
    batch = rng.choice(["two", "one", "ten"], 300)
    truth[batch == "ten"] = "a"
    guess = np.where(rng.random(300) < 0.7, truth, rng.choice(["a", "b", "c"], 300))
    scores = score_by_batch(truth, guess, batch, train_classes=["a", "b", "c"])
    each = []
    for number, name in enumerate(["one", "ten", "two"], start=1):
        inside = batch == name
        kinds = sorted(set(truth[inside]))
        each.append(f1_score(truth[inside], guess[inside], labels=kinds, average="macro"))
        assert scores[f"macro_f1_test.batch_{number:02d}.v1"] == pytest.approx(each[-1], abs=1e-6)
        assert scores[f"n_batch_{number:02d}_cells"] == inside.sum()
    assert scores["macro_f1_test.batch_mean.v1"] == pytest.approx(np.mean(each), abs=1e-6)
    assert scores["macro_f1_test.batch_min.v1"] == pytest.approx(min(each), abs=1e-6)
    assert scores["n_query_batches"] == 3
    assert all(metric(name) for name in scores)


def test_many_batches_give_mean_and_least_only() -> None:
    num = MOST_BATCHES + 1
    truth = ["a", "b"] * num
    batch = np.repeat([f"b{i}" for i in range(num)], 2)
    scores = score_by_batch(truth, ["a", "a"] * num, batch, train_classes=["a", "b"])
    assert set(scores) == {
        "macro_f1_test.batch_mean.v1",
        "macro_f1_test.batch_min.v1",
        "n_query_batches",
    }
    assert scores["macro_f1_test.batch_min.v1"] == pytest.approx(1 / 3)


def test_refusals() -> None:
    with pytest.raises(DataError, match="2 true labels, 2 predictions and 1 batches"):
        score_by_batch(["a", "b"], ["a", "b"], ["x"], train_classes=["a", "b"])
    with pytest.raises(DataError, match="no cell to score"):
        score_by_batch([], [], [], train_classes=["a"])
    with pytest.raises(DataError, match="1 of 2 batch labels are missing"):
        score_by_batch(["a", "b"], ["a", "b"], ["x", None], train_classes=["a", "b"])
