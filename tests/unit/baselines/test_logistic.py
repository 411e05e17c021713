"""Logistic baseline: what its seed changes and what not, and strengths it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from cells_for_baselines import made_cells
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from cellray.baselines._features import fit_genes
from cellray.baselines.logistic import BASELINE, LogisticConfig, inner_folds
from cellray.core.errors import ConfigError
from cellray.core.section import build_section


def small(**over: object) -> LogisticConfig:
    return build_section(LogisticConfig, {"name": "logistic", "num_genes": 40} | over)


def test_the_seed_deals_the_inner_folds_and_nothing_else() -> None:
    """Genes and scale never move; the coefficients are a function of the chosen strength alone."""
    counts, labels = made_cells(90, seed=2)
    labels[::2] = (labels[::2] + 1) % 3  # half are wrong, so that the choice is not plain
    fits = [BASELINE.fit(small(), counts, labels, seed) for seed in range(6)]
    folds = {inner_folds(labels, folds=3, seed=seed).tobytes() for seed in range(6)}
    assert len(folds) == 6
    by_strength = {}
    for fit in fits:
        np.testing.assert_array_equal(fit.genes.genes, fits[0].genes.genes)
        np.testing.assert_array_equal(fit.genes.scale, fits[0].genes.scale)
        first = by_strength.setdefault(fit.strength, fit.model.coef_)
        np.testing.assert_array_equal(fit.model.coef_, first)
    assert set(by_strength) <= set(small().strengths)
    assert len(by_strength) >= 2


@pytest.mark.parametrize("over", [{"folds": 0}, {"strengths": [0.5]}])
def test_without_a_choice_to_make_no_seed_changes_anything(over: dict[str, object]) -> None:
    counts, labels = made_cells(60)
    first, second = (BASELINE.fit(small(**over), counts, labels, seed) for seed in (1, 2))
    np.testing.assert_array_equal(first.model.coef_, second.model.coef_)
    np.testing.assert_array_equal(first.model.intercept_, second.model.intercept_)


@pytest.mark.parametrize("noise", [None, 0, 5])
def test_the_strength_is_the_best_of_the_inner_folds(noise: int | None) -> None:
    """Written out with scikit-learn; without a signal either strength may be the better one."""
    counts, labels = made_cells(120)
    if noise is not None:
        labels = np.random.default_rng(noise).permutation(labels)
    config = small(strengths=[1e-4, 1.0])
    fold = inner_folds(labels, folds=config.folds, seed=0)
    scores = {}
    for strength in config.strengths:
        guess = np.empty_like(labels)
        for part in range(config.folds):
            inside = fold != part
            genes = fit_genes(counts[inside], config)
            model = LogisticRegression(C=strength, max_iter=config.max_iterations)
            model.fit(genes.scaled(counts[inside]), labels[inside])
            guess[~inside] = model.predict(genes.scaled(counts[~inside]))
        scores[strength] = f1_score(labels, guess, average="macro")
    assert BASELINE.fit(config, counts, labels, 0).strength == max(scores, key=scores.__getitem__)
    if noise is None:
        assert max(scores, key=scores.__getitem__) == 1.0


def test_a_class_of_fewer_cells_than_folds_misses_some() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [2], dtype=np.int64)
    folds = inner_folds(labels, folds=3, seed=4)
    for code in range(3):
        share = np.bincount(folds[labels == code], minlength=3)
        assert share.max() - share.min() <= 1
    assert np.bincount(folds, minlength=3).tolist() == [4, 3, 3]


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_a_strength_that_is_not_positive_is_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match=rf"strengths.* = {bad} is not allowed: .*greater than 0"):
        small(strengths=[1.0, bad])


def test_no_strength_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"strengths = \[\] is not allowed"):
        small(strengths=[])
