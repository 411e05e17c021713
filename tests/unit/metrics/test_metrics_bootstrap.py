"""The bootstrap over units against a loop that resamples cells, and its speed."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from cellray.core.errors import DataError
from cellray.metrics.bootstrap import MATRIX_SCORES, bootstrap_units, draw_units
from cellray.metrics.classification import score_annotation


def answers(num: int, classes: int, units: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    unit = rng.integers(0, units, num)
    truth = rng.integers(0, classes, num)
    skill = rng.uniform(0.3, 0.95, units)
    guess = np.where(rng.random(num) < skill[unit], truth, rng.integers(0, classes, num))
    truth[unit == 0] = 0  # a class that some resamples lack
    name = np.array([f"t{i:02d}" for i in range(classes)], dtype=object)
    return name[truth], name[guess], np.array([f"d{u}" for u in unit], dtype=object)


@pytest.mark.parametrize("score", sorted(MATRIX_SCORES))
def test_each_id_is_the_metric_of_that_id(score):
    truth, guess, units = answers(400, 5, 6)
    classes = sorted({*truth, *guess})
    expected = score_annotation(truth, guess, train_classes=classes)[score]
    found = bootstrap_units(truth, guess, units, score, draws=50, seed=3)
    assert found.value == pytest.approx(expected, abs=1e-12)
    slow = bootstrap_units(
        truth,
        guess,
        units,
        lambda t, p: score_annotation(t, p, train_classes=classes)[score],
        draws=50,
        seed=3,
    )
    assert found.ci95_low == pytest.approx(slow.ci95_low, abs=1e-12)
    assert found.ci95_high == pytest.approx(slow.ci95_high, abs=1e-12)
    assert found.num_draws == 50
    assert found.num_units == 6
    assert found.remark == ""


def test_against_a_naive_loop_with_scikit_learn():
    truth, guess, units = answers(300, 4, 5, seed=2)
    names = sorted(set(units))
    values = {"macro_f1.union.v1": [], "balanced_accuracy.v1": []}
    for times in draw_units(5, 40, 7):
        rows = np.concatenate(
            [np.tile(np.flatnonzero(units == n), t) for n, t in zip(names, times, strict=True)]
        )
        t, p = truth[rows].astype(str), guess[rows].astype(str)
        values["macro_f1.union.v1"].append(f1_score(t, p, average="macro", zero_division=0))
        values["balanced_accuracy.v1"].append(balanced_accuracy_score(t, p))
    for score, list_of in values.items():
        found = bootstrap_units(truth, guess, units, score, draws=40, seed=7)
        low, high = np.quantile(list_of, [0.025, 0.975])
        assert found.ci95_low == pytest.approx(low, abs=1e-9)
        assert found.ci95_high == pytest.approx(high, abs=1e-9)


def test_draws_are_of_whole_units_and_follow_from_the_seed():
    drawn = draw_units(7, 2000, 1)
    assert (drawn.sum(axis=1) == 7).all()
    np.testing.assert_array_equal(drawn, draw_units(7, 2000, 1))
    assert (drawn != draw_units(7, 2000, 2)).any()
    assert abs(drawn.mean(axis=0) - 1).max() < 0.1
    assert abs((drawn == 0).mean() - (6 / 7) ** 7) < 0.02


def test_the_order_of_cells_does_not_matter():
    truth, guess, units = answers(200, 3, 5)
    order = np.random.default_rng(1).permutation(200)
    first = bootstrap_units(truth, guess, units, "accuracy.v1", seed=5)
    second = bootstrap_units(truth[order], guess[order], units[order], "accuracy.v1", seed=5)
    assert first == second


def test_the_interval_of_a_mean_is_what_theory_says():
    """Units of one cell each: the bootstrap of a share p over n has sd sqrt(p (1 - p) / n)."""
    truth = np.array(["a"] * 400)
    guess = np.array(["a"] * 300 + ["b"] * 100)
    units = np.array([f"u{i}" for i in range(400)])
    found = bootstrap_units(truth, guess, units, "accuracy.v1", draws=4000)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert found.ci95_low == pytest.approx(0.75 - half, abs=0.005)
    assert found.ci95_high == pytest.approx(0.75 + half, abs=0.005)


def test_few_units_are_remarked():
    truth, guess, units = answers(100, 3, 3)
    assert "only 3 units" in bootstrap_units(truth, guess, units, "accuracy.v1").remark
    one = bootstrap_units(truth, guess, ["d"] * 100, "accuracy.v1")
    assert np.isnan(one.ci95_low)
    assert "one unit only: no interval" in one.remark


def test_resamples_without_a_score_are_left_out():
    truth, guess, units = answers(100, 3, 6)
    values = iter([0.5, *[0.1, float("nan")] * 10])
    found = bootstrap_units(truth, guess, units, lambda t, p: next(values), draws=20)
    assert found.num_draws in (10, 11)


def test_refusals():
    truth, guess, units = answers(50, 3, 6)
    with pytest.raises(DataError, match=r"'n_items' does not follow from .*give a function of"):
        bootstrap_units(truth, guess, units, "n_items")
    with pytest.raises(DataError, match="50 true labels, 50 predictions and 49 units"):
        bootstrap_units(truth, guess, units[1:], "accuracy.v1")
    with pytest.raises(DataError, match="draws = 1: an interval needs at least 2"):
        bootstrap_units(truth, guess, units, "accuracy.v1", draws=1)
    with pytest.raises(DataError, match="not a number in any of 5 resamples"):
        bootstrap_units(truth, guess, units, lambda t, p: float("nan"), draws=5)
    with pytest.raises(DataError, match="1 of 50 predicted labels are missing"):
        bootstrap_units(truth, [None, *guess[1:]], units, "accuracy.v1")


def test_a_thousand_draws_of_100_000_cells_are_quick():
    truth, guess, units = answers(100_000, 30, 40)
    started = time.perf_counter()
    bootstrap_units(truth, guess, units, "macro_f1.union.v1", draws=1000)
    assert time.perf_counter() - started < 3.0  # 0.2 s on an idle core
