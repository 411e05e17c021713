"""Annotation metrics: goldens by hand, and against scikit-learn as a second implementation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from cellray.core.errors import DataError
from cellray.metrics.classification import (
    METRICS,
    confusion_matrix,
    score_annotation,
)


def by_hand() -> tuple[list[str], list[str]]:
    """a: 3 of 4 right; b: 2 of 3, one taken for a; c: 0 of 1, taken for a; one a taken for d."""
    truth = ["a", "a", "a", "a", "b", "b", "b", "c"]
    predicted = ["a", "a", "a", "d", "b", "b", "a", "a"]
    return truth, predicted


def test_goldens_by_hand() -> None:
    truth, predicted = by_hand()
    scores = score_annotation(truth, predicted, train_classes=["a", "b", "d"])
    f1_a, f1_b = 2 * 3 / (4 + 5), 2 * 2 / (3 + 2)
    assert scores["accuracy.v1"] == 5 / 8
    assert scores["macro_precision.union.v1"] == pytest.approx((3 / 5 + 1 + 0 + 0) / 4)
    assert scores["macro_recall.union.v1"] == pytest.approx((3 / 4 + 2 / 3 + 0 + 0) / 4)
    assert scores["macro_f1.union.v1"] == pytest.approx((f1_a + f1_b) / 4)
    assert scores["macro_precision.test.v1"] == pytest.approx((3 / 5 + 1 + 0) / 3)
    assert scores["macro_f1.test.v1"] == pytest.approx((f1_a + f1_b) / 3)
    assert scores["weighted_f1.v1"] == pytest.approx((4 * f1_a + 3 * f1_b) / 8)
    assert scores["balanced_accuracy.v1"] == pytest.approx((3 / 4 + 2 / 3) / 3)
    counts = {k: v for k, v in scores.items() if k.startswith("n_")}
    assert counts == {
        "n_train_classes": 3.0,
        "n_test_classes": 3.0,
        "n_unseen_classes": 1.0,
        "n_unseen_cells": 1.0,
        "n_items": 8.0,
    }


def test_one_stray_prediction_drops_the_union_macro_f1_only() -> None:
    """One of 100 cells predicted as a class the test lacks: 0.997 over test, 0.748 over union."""
    truth = ["a"] * 30 + ["b"] * 19 + ["c"] * 51
    predicted = [*truth[:-1], "x"]
    scores = score_annotation(truth, predicted, train_classes=["a", "b", "c", "x"])
    f1_c = 2 * 50 / (51 + 50)
    assert scores["accuracy.v1"] == 0.99
    assert scores["macro_f1.test.v1"] == pytest.approx((2 + f1_c) / 3)
    assert scores["macro_f1.union.v1"] == pytest.approx((2 + f1_c) / 4)
    assert round(scores["macro_f1.test.v1"], 3) == 0.997
    assert round(scores["macro_f1.union.v1"], 3) == 0.748


def test_a_perfect_method_is_capped_by_an_unseen_class() -> None:
    """11 test classes, one not in training: at most 10/11, whatever the method."""
    truth = [f"class{i:02d}" for i in range(11) for _ in range(10)]
    predicted = [t if t != "class10" else "class00" for t in truth]
    known = [f"class{i:02d}" for i in range(10)] + ["x", "y", "z"]
    scores = score_annotation(truth, predicted, train_classes=known)
    assert scores["balanced_accuracy.v1"] == pytest.approx(10 / 11)
    assert scores["macro_f1.test.v1"] < 10 / 11
    assert scores["n_unseen_classes"] == 1
    assert scores["n_unseen_cells"] == 10
    assert scores["accuracy.v1"] == pytest.approx(100 / 110)


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = np.array([f"t{i}" for i in range(9)])
    weights = rng.dirichlet(np.full(9, 0.4))
    truth = names[rng.choice(9, 120, p=weights)]
    predicted = np.where(rng.random(120) < 0.6, truth, names[rng.integers(0, 9, 120)])
    scores = score_annotation(truth, predicted, train_classes=names.tolist())
    test = sorted(set(truth))
    macro = {"average": "macro", "zero_division": 0}
    expected = {
        "accuracy.v1": sk.accuracy_score(truth, predicted),
        "macro_precision.union.v1": sk.precision_score(truth, predicted, **macro),
        "macro_recall.union.v1": sk.recall_score(truth, predicted, **macro),
        "macro_f1.union.v1": sk.f1_score(truth, predicted, **macro),
        "macro_precision.test.v1": sk.precision_score(truth, predicted, labels=test, **macro),
        "macro_f1.test.v1": sk.f1_score(truth, predicted, labels=test, **macro),
        "weighted_f1.v1": sk.f1_score(truth, predicted, average="weighted", zero_division=0),
        "balanced_accuracy.v1": sk.recall_score(truth, predicted, labels=test, **macro),
    }
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, abs=1e-12), name
    matrix, rows = confusion_matrix(truth, predicted)
    np.testing.assert_array_equal(matrix, sk.confusion_matrix(truth, predicted, labels=rows))


def test_every_score_has_a_described_metric() -> None:
    truth, predicted = by_hand()
    scores = score_annotation(truth, predicted, train_classes=["a", "b", "d"])
    assert set(scores) == set(METRICS)
    for name, metric in METRICS.items():
        assert metric.id == name
        assert (metric.higher_is_better is None) == name.startswith("n_")


def test_given_classes_fix_the_matrix() -> None:
    matrix, names = confusion_matrix(["b", "a"], ["a", "a"], classes=["b", "a", "z"])
    assert names == ("b", "a", "z")
    assert matrix.tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_labels_may_be_categorical_arrays_of_any_kind() -> None:
    as_text = score_annotation(["1", "2"], ["1", "1"], train_classes=["1", "2"])
    as_numbers = score_annotation(np.array([1, 2]), np.array([1, 1]), train_classes=["1", "2"])
    assert as_text == as_numbers


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        (["a"], ["a", "a"], "1 true labels but 2 predictions"),
        ([], [], "the test set is empty"),
        (["a", None], ["a", "a"], "1 of 2 true labels are missing"),
        (["a", pd.NA], ["a", "a"], "1 of 2 true labels are missing"),
        (["a", np.float32("nan")], ["a", "a"], "1 of 2 true labels are missing"),
        (["a", "a"], ["a", float("nan")], "1 of 2 predicted labels are missing"),
        (np.array([["a"]]), ["a"], r"true labels have shape \(1, 1\); give one label per cell"),
        (["a"], ["z"], "predictions hold classes that training lacked: z"),
    ],
)
def test_bad_labels_are_refused(truth: list[str], predicted: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score_annotation(truth, predicted, train_classes=["a"])


def test_a_label_outside_given_classes_is_refused() -> None:
    with pytest.raises(DataError, match="labels outside the given classes: b"):
        confusion_matrix(["a"], ["b"], classes=["a"])
