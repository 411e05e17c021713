"""The three baselines: what they predict, that nothing of the test cells reaches the fit."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import anndata
import numpy as np
import pytest
from cells_for_baselines import made_cells
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

from cellray.baselines import logistic
from cellray.baselines._vote import count_votes
from cellray.baselines.base import BaselineUnit, baseline
from cellray.core import registry
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.metrics.classification import score_annotation

NAMES = ["knn", "logistic", "majority"]


def unit_and_config(name: str) -> tuple[BaselineUnit, object]:
    unit = baseline(name)
    small = {"num_genes": 40} if name != "majority" else {}
    return unit, build_section(unit.config, {"name": name, **small})


def test_the_registry_lists_the_baselines_and_nothing_else() -> None:
    others = ["batch_only", "celltype_jitter", "combat", "harmony", "hvg", "noise", "pca"]
    others += ["random_projection", "scvi", "shuffled_labels"]
    assert registry.names("cellray.baselines") == sorted([*NAMES, *others])


@pytest.mark.parametrize("name", NAMES)
def test_unit_and_config_carry_the_module_name(name: str) -> None:
    unit = baseline(name)
    assert unit.name == name
    assert unit.config().name == name  # type: ignore[call-arg]


def test_an_unknown_baseline_is_explained() -> None:
    with pytest.raises(ConfigError, match="no 'logistik' in baselines. Did you mean 'logistic'"):
        baseline("logistik")


def test_majority_predicts_the_most_frequent_training_class() -> None:
    counts, _ = made_cells(5)
    predictor = baseline("majority").fit(None, counts, np.array([2, 1, 2, 1, 1]), 0)
    assert predictor.predict(counts).tolist() == [1] * 5
    assert predictor.embed(counts) is None


def test_a_tie_of_the_majority_goes_to_the_first_class() -> None:
    counts, _ = made_cells(4)
    predictor = baseline("majority").fit(None, counts, np.array([3, 1, 1, 3]), 0)
    assert predictor.predict(counts[:1]).tolist() == [1]


@pytest.mark.parametrize("name", ["knn", "logistic"])
def test_made_types_are_told_apart(name: str) -> None:
    unit, config = unit_and_config(name)
    counts, labels = made_cells(300)
    predictor = unit.fit(config, counts[:200], labels[:200], 0)
    assert (predictor.predict(counts[200:]) == labels[200:]).mean() > 0.97


@pytest.mark.parametrize("name", NAMES)
def test_fitted_state_does_not_depend_on_test_cells(name: str) -> None:
    """Test cells permuted, changed or absent: the fitted state is the same, byte for byte."""
    unit, config = unit_and_config(name)
    counts, labels = made_cells(120)
    train = np.arange(0, 120, 2)
    states = []
    for kind in range(3):
        cells = counts.toarray()
        test = np.setdiff1d(np.arange(120), train)
        if kind == 1:
            cells[test] = cells[np.random.default_rng(1).permutation(test)]
        if kind == 2:
            cells[test] = 7.0
        whole = sparse.csr_matrix(cells)
        predictor = unit.fit(config, whole[train], labels[train], 3)
        predictor.predict(whole[test])
        states.append(pickle.dumps(predictor))
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("name", NAMES)
def test_predictions_do_not_depend_on_the_other_cells_asked_about(name: str) -> None:
    unit, config = unit_and_config(name)
    counts, labels = made_cells(120)
    predictor = unit.fit(config, counts, labels, 0)
    together = predictor.predict(counts)
    order = np.random.default_rng(0).permutation(120)
    np.testing.assert_array_equal(predictor.predict(counts[order]), together[order])
    assert predictor.predict(counts[5:6]).tolist() == [together[5]]
    assert predictor.predict(counts[:0]).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_given_the_seed(name: str) -> None:
    unit, config = unit_and_config(name)
    counts, labels = made_cells(90)
    first, again = (pickle.dumps(unit.fit(config, counts, labels, 5)) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_seed_scope_means_that_no_seed_changes_anything(name: str) -> None:
    unit, config = unit_and_config(name)
    counts, labels = made_cells(90)
    assert unit.seed_scope == {"knn": "", "majority": "", "logistic": "inner_folds"}[name]
    if not unit.seed_scope:
        states = {pickle.dumps(unit.fit(config, counts, labels, seed)) for seed in range(3)}
        assert len(states) == 1


def test_knn_agrees_with_scikit_learn_on_the_same_genes() -> None:
    counts, labels = made_cells(200, seed=4)
    unit, config = unit_and_config("knn")
    config = config.model_copy(update={"num_neighbors": 7, "num_components": 6})  # type: ignore[attr-defined]
    predictor = unit.fit(config, counts[:150], labels[:150], 0)
    genes = predictor.projection.genes  # type: ignore[attr-defined]
    values = genes.apply(counts).toarray().astype(np.float64)
    pca = PCA(6, svd_solver="full").fit(values[:150])
    other = KNeighborsClassifier(7).fit(pca.transform(values[:150]), labels[:150])
    theirs = other.predict(pca.transform(values[150:]))
    np.testing.assert_array_equal(predictor.predict(counts[150:]), theirs)
    embedding = predictor.embed(counts[150:])
    assert embedding is not None
    np.testing.assert_allclose(np.abs(embedding), np.abs(pca.transform(values[150:])), atol=1e-4)


@pytest.mark.parametrize(
    ("neighbours", "winner"),
    [([2, 0, 0], 0), ([2, 0, 1], 2), ([1, 2, 2, 1], 1), ([0, 2, 1, 1, 2], 2), ([3], 3)],
)
def test_votes_are_counted_and_ties_go_to_the_nearest(neighbours: list[int], winner: int) -> None:
    assert count_votes(np.array([neighbours], dtype=np.int64))[0].tolist() == [winner]


def test_knn_takes_all_cells_if_there_are_fewer_than_its_neighbours() -> None:
    counts, labels = made_cells(8)
    unit, config = unit_and_config("knn")
    predictor = unit.fit(config, counts, labels, 0)
    majority = np.bincount(labels).max()
    assert set(predictor.predict(counts)) <= set(np.flatnonzero(np.bincount(labels) == majority))


def test_inner_folds_share_every_class_and_follow_the_seed() -> None:
    labels = np.repeat([0, 1, 2], [30, 9, 3]).astype(np.int64)
    folds = logistic.inner_folds(labels, folds=3, seed=0)
    for code, each in ((0, 10), (1, 3), (2, 1)):
        assert np.bincount(folds[labels == code], minlength=3).tolist() == [each] * 3
    np.testing.assert_array_equal(folds, logistic.inner_folds(labels, folds=3, seed=0))
    assert (folds != logistic.inner_folds(labels, folds=3, seed=1)).any()


def test_logistic_chooses_its_strength_by_inner_folds() -> None:
    """Labels without signal want the strongest penalty or none better; with signal, it scores."""
    counts, labels = made_cells(120)
    unit, config = unit_and_config("logistic")
    chosen = unit.fit(config, counts, labels, 0).strength  # type: ignore[attr-defined]
    assert chosen in config.strengths  # type: ignore[attr-defined]
    fixed = config.model_copy(update={"strengths": [0.5]})  # type: ignore[attr-defined]
    assert unit.fit(fixed, counts, labels, 0).strength == 0.5  # type: ignore[attr-defined]
    unchecked = config.model_copy(update={"folds": 0, "strengths": [3.0, 0.1]})  # type: ignore[attr-defined]
    assert unit.fit(unchecked, counts, labels, 0).strength == 3.0  # type: ignore[attr-defined]


def test_logistic_with_one_class_predicts_it() -> None:
    counts, _ = made_cells(12)
    unit, config = unit_and_config("logistic")
    predictor = unit.fit(config, counts, np.full(12, 4), 0)
    assert predictor.predict(counts).tolist() == [4] * 12


def test_logistic_survives_classes_of_one_cell() -> None:
    counts, labels = made_cells(60)
    labels[labels == 2] = 1
    labels[0] = 2
    unit, config = unit_and_config("logistic")
    assert unit.fit(config, counts, labels, 0).predict(counts[1:]).shape == (59,)


def test_logistic_says_when_it_did_not_converge() -> None:
    counts, labels = made_cells(60)
    unit, config = unit_and_config("logistic")
    short = config.model_copy(update={"max_iterations": 1, "strengths": [10.0]})  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="stopped after max_iterations = 1, before it converged"):
        unit.fit(short, counts, labels, 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("short", "60 training cells but 59 labels"),
        ("empty", "no training cell with a label"),
        ("missing", "1 training labels are negative codes"),
        ("logged", "baselines take raw counts and normalise them themselves"),
        ("negative", "these hold negative or missing values"),
        ("nan", "these hold negative or missing values"),
    ],
)
def test_bad_training_cells_are_refused(name: str, change: str, message: str) -> None:
    unit, config = unit_and_config(name)
    counts, labels = made_cells(60)
    if change == "short":
        labels = labels[:-1]
    if change == "empty":
        counts, labels = counts[:0], labels[:0]
    if change == "missing":
        labels[0] = -1
    if change == "logged":
        counts.data = np.log1p(counts.data)
    if change == "negative":
        counts.data[0] = -1
    if change == "nan":
        counts.data[0] = np.nan
    with pytest.raises(DataError, match=message):
        unit.fit(config, counts, labels, 0)


@pytest.mark.parametrize("name", NAMES)
def test_cells_over_other_genes_are_refused(name: str) -> None:
    unit, config = unit_and_config(name)
    counts, labels = made_cells(60)
    predictor = unit.fit(config, counts, labels, 0)
    with pytest.raises(DataError, match="fitted on 120 genes but asked about cells over 119"):
        predictor.predict(counts[:, :119])


def test_real_pancreas_held_out_donor() -> None:
    """Baselines on human1 and human2, scored on human3, land where they were measured."""
    if not os.environ.get("CELLRAY_DATA"):
        pytest.skip("not run: CELLRAY_DATA is not set")
    file = Path(os.environ["CELLRAY_DATA"]) / "cells/pancreas_baron_human_donors123.h5ad"
    cells = anndata.read_h5ad(file)
    test = (cells.obs["donor"] == "human3").to_numpy()
    labels = cells.obs["cell_type"].astype(str).to_numpy()
    counts = sparse.csr_matrix(cells.X, dtype=np.float32)
    classes = sorted(set(labels[~test]))
    codes = np.array([classes.index(label) for label in labels[~test]], dtype=np.int64)
    found = {}
    for name in NAMES:
        unit = baseline(name)
        config = unit.config(name=name)
        if name == "logistic":
            config = config.model_copy(update={"strengths": [1.0]})
        predictor = unit.fit(config, counts[~test], codes, 0)
        guess = [classes[i] for i in predictor.predict(counts[test])]
        found[name] = score_annotation(labels[test], guess, train_classes=classes)
    assert found["majority"]["accuracy.v1"] == pytest.approx(206 / 914)
    assert found["knn"]["accuracy.v1"] == pytest.approx(0.965, abs=0.01)
    assert found["knn"]["macro_f1.test.v1"] == pytest.approx(0.847, abs=0.04)
    assert found["logistic"]["accuracy.v1"] == pytest.approx(0.974, abs=0.01)
    assert found["logistic"]["macro_f1.test.v1"] == pytest.approx(0.964, abs=0.03)
