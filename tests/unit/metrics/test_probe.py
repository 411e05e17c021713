"""Probes: the same numbers as scikit-learn used directly, the same folds for every method."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_validate
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cellray.core.errors import DataError
from cellray.metrics import probe as probes
from cellray.metrics.probe import probe_embedding, probe_folds, probe_labels, scored_rows


def cells(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three classes that overlap, and one of 4 cells."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(["a", "b", "c", "rare"], [60, 40, 23, 4]))
    centre = {"a": 0.0, "b": 1.0, "c": 2.0, "rare": 9.0}
    points = rng.normal(size=(len(labels), 6)) * [1, 5, 1, 1, 1, 0.1]
    points[:, 0] += [centre[name] for name in labels]
    return points, labels


def by_hand(points: np.ndarray, labels: np.ndarray, head: object) -> dict[str, float]:
    folds = StratifiedKFold(5, shuffle=True, random_state=42)
    model = make_pipeline(StandardScaler(with_mean=False), head)
    found = cross_validate(model, points, labels, cv=folds, scoring=["accuracy", "f1_macro"])
    return {name: float(found[f"test_{name}"].mean()) for name in ("accuracy", "f1_macro")}


def test_both_probes_are_scikit_learns() -> None:
    points, labels = cells()
    scores = probe_embedding(points, labels)
    kept = labels != "rare"
    for probe, head in (
        ("knn", KNeighborsClassifier(5)),
        ("linear", LogisticRegression(max_iter=1000)),
    ):
        other = by_hand(points[kept], labels[kept], head)
        assert scores[f"accuracy.{probe}_probe.v1"] == pytest.approx(other["accuracy"], abs=1e-6)
        assert scores[f"macro_f1.{probe}_probe.v1"] == pytest.approx(other["f1_macro"], abs=1e-6)
        assert 0.4 < other["accuracy"] < 0.95


def test_what_is_dropped_is_counted() -> None:
    points, labels = cells()
    scores = probe_embedding(points, labels)
    assert scores["n_probe_dropped_cells"] == 4
    assert scores["n_probe_dropped_classes"] == 1
    assert scores["n_probe_cells"] == 123
    assert scores["n_probe_classes"] == 3


def test_a_majority_vote_is_scored_by_the_same_folds() -> None:
    points, labels = cells()
    folds = probe_folds(labels)
    seen: list[np.ndarray] = []

    def majority(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
        assert not set(inside) & set(outside)
        seen.append(outside)
        names, counts = np.unique(labels[inside], return_counts=True)
        return np.full(len(outside), names[counts.argmax()])

    scores = probe_labels(folds, majority)
    kept = labels != "rare"
    other = by_hand(points[kept], labels[kept], DummyClassifier(strategy="most_frequent"))
    assert scores["accuracy.linear_probe.v1"] == pytest.approx(other["accuracy"], abs=1e-6)
    assert scores["macro_f1.linear_probe.v1"] == pytest.approx(other["f1_macro"], abs=1e-6)
    assert set(scores) == {"accuracy.linear_probe.v1", "macro_f1.linear_probe.v1"}
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.flatnonzero(kept))


def test_folds_depend_on_the_labels_alone() -> None:
    _, labels = cells()
    first, second = probe_folds(labels), probe_folds(list(labels))
    np.testing.assert_array_equal(first.rows, second.rows)
    np.testing.assert_array_equal(first.fold, second.fold)
    for name in ("a", "b", "c"):
        sizes = np.bincount(first.fold[first.labels == name], minlength=5)
        assert sizes.max() - sizes.min() <= 1


def test_small_selections_are_scored_whole_and_large_ones_by_share() -> None:
    labels = np.repeat(["a", "b", "c"], [700, 290, 10])
    np.testing.assert_array_equal(scored_rows(labels), np.arange(1000))
    rows = scored_rows(labels, most=100, seed=1)
    assert (np.diff(rows) > 0).all()
    names, counts = np.unique(labels[rows], return_counts=True)
    assert dict(zip(names, counts, strict=True)) == {"a": 70, "b": 29, "c": 1}
    np.testing.assert_array_equal(rows, scored_rows(labels, most=100, seed=1))
    assert set(rows) != set(scored_rows(labels, most=100, seed=2))
    few = scored_rows(np.repeat(["a", "b", "c"], [996, 2, 2]), most=10)
    assert len(few) == 10
    assert len(set(np.repeat(["a", "b", "c"], [996, 2, 2])[few])) == 3


def test_refusals() -> None:
    points, labels = cells()
    with pytest.raises(DataError, match="1 of 2 classes have at least 10 cells; a probe needs two"):
        probe_folds(["a"] * 20 + ["b"] * 3)
    with pytest.raises(DataError, match="127 cells in the embedding but 126 labels"):
        probe_embedding(points, labels[1:])
    with pytest.raises(DataError, match="3 labels do not fit into a subsample of 2 cells"):
        scored_rows(["a", "b", "c"], most=2)
    with pytest.raises(DataError, match="predictions hold classes that training lacked: z"):
        probe_labels(probe_folds(labels), lambda inside, outside: ["z"] * len(outside))


def test_the_same_embedding_is_probed_once_and_another_anew(monkeypatch) -> None:
    rng = np.random.default_rng(3)
    labels = np.array([f"t{i % 3}" for i in range(90)], dtype=object)
    points = rng.normal(size=(90, 4)) + np.arange(90)[:, None] % 3
    first = probe_embedding(points, labels)
    calls = []
    real = probes._probe
    monkeypatch.setattr(probes, "_probe", lambda *a: calls.append(1) or real(*a))
    again = probe_embedding(points.copy(), labels.copy())
    assert again == first
    again["accuracy.knn_probe.v1"] = -1.0  # a copy, not what is kept
    assert probe_embedding(points, labels) == first
    assert not calls
    assert probe_embedding(points, labels[::-1].copy()) != first
    assert probe_embedding(points[:, :2], labels) != first
    assert len(calls) == 2
