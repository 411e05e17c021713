"""Spread and intervals against formulae by hand and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cellray.bench.stats import (
    holm,
    paired_difference,
    paired_t,
    summarise,
    wilcoxon,
)
from cellray.core.errors import DataError


def test_mean_deviation_and_interval_golden() -> None:
    found = summarise([0.80, 0.82, 0.87])
    assert found.mean == pytest.approx(0.83)
    assert found.sd == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2))
    half = 4.302652729911275 * found.sd / math.sqrt(3)  # t(0.975, 2 degrees of freedom)
    assert found.ci95_low == pytest.approx(0.83 - half)
    assert found.ci95_high == pytest.approx(0.83 + half)


def test_interval_agrees_with_scipy() -> None:
    values = [0.1, 0.4, 0.35, 0.22, 0.9]
    found = summarise(values)
    low, high = stats.t.interval(0.95, 4, loc=found.mean, scale=stats.sem(values))
    assert (found.ci95_low, found.ci95_high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize(("values", "spread"), [([0.5], True), ([0.5, 0.5], False)])
def test_a_spread_that_does_not_exist_is_nan_not_zero(values: list[float], spread: bool) -> None:
    found = summarise(values, spread=spread)
    assert found.mean == 0.5
    assert all(math.isnan(x) for x in (found.sd, found.ci95_low, found.ci95_high))


def test_paired_difference_is_over_common_seeds() -> None:
    found = paired_difference({0: 0.9, 1: 0.8, 2: 0.7}, {2: 0.6, 0: 0.7, 5: 0.1})
    assert found.num == 2
    assert found.mean == pytest.approx(0.15)
    assert found.sd == pytest.approx(math.sqrt(0.05**2 * 2))


def test_pairing_removes_what_seeds_share() -> None:
    shared = {0: 0.1, 1: 0.5, 2: 0.9}
    found = paired_difference({s: v + 0.02 for s, v in shared.items()}, shared)
    assert found.sd == pytest.approx(0, abs=1e-12)
    assert found.ci95_low == pytest.approx(0.02)


def test_errors_name_the_problem() -> None:
    with pytest.raises(DataError, match="no value to summarise"):
        summarise([])
    with pytest.raises(DataError, match="1 of 2 values are not finite"):
        summarise([0.5, float("nan")])
    with pytest.raises(DataError, match=r"no seed in common to pair: \[0\] and \[1\]"):
        paired_difference({0: 1.0}, {1: 1.0})


@pytest.mark.parametrize("num", [5, 8, 12])
def test_wilcoxon_agrees_with_scipys_exact_test(num: int) -> None:
    rng = np.random.default_rng(num)
    for shift in (0.0, 0.4, 1.5):
        values = rng.normal(shift, 1.0, num)
        expected = stats.wilcoxon(values, method="exact").pvalue
        assert wilcoxon(list(values)) == pytest.approx(expected, abs=1e-12)


def test_wilcoxon_with_ties_agrees_with_all_signs_by_hand() -> None:
    values = [0.2, -0.1, 0.2, 0.3, 0.1, -0.2]
    ranks = stats.rankdata(np.abs(values))
    found = sum(r for r, v in zip(ranks, values, strict=True) if v > 0)
    sums = [
        sum(r for r, up in zip(ranks, signs, strict=True) if up)
        for signs in itertools.product([False, True], repeat=len(values))
    ]
    high = np.mean([s >= found - 1e-9 for s in sums])
    low = np.mean([s <= found + 1e-9 for s in sums])
    assert wilcoxon(values) == pytest.approx(min(1.0, 2 * min(high, low)), abs=1e-12)


def test_wilcoxon_of_five_seeds_cannot_be_below_a_sixteenth() -> None:
    assert wilcoxon([1.0, 2.0, 3.0, 4.0, 5.0]) == 0.0625
    assert wilcoxon([0.0, 0.0]) == 1.0
    assert wilcoxon([0.0, 0.5]) == 1.0  # zeros are left out


def test_paired_t_agrees_with_scipy() -> None:
    first, second = [0.9, 0.8, 0.85, 0.7], [0.7, 0.75, 0.8, 0.72]
    expected = stats.ttest_rel(first, second).pvalue
    found = paired_t([a - b for a, b in zip(first, second, strict=True)])
    assert found == pytest.approx(expected, abs=1e-12)


def test_paired_t_of_no_spread() -> None:
    assert math.isnan(paired_t([0.3]))
    assert math.isnan(paired_t([0.3, 0.3]))  # a constant is no evidence of a spread
    assert paired_t([0.0, 0.0, 0.0]) == 1.0


def test_paired_t_and_the_interval_say_the_same() -> None:
    """p < 0.05 exactly where the 95 % interval of the difference leaves out zero."""
    rng = np.random.default_rng(3)
    for shift in np.linspace(0, 2, 30):
        values = list(rng.normal(shift, 1.0, 5))
        interval = summarise(values)
        outside = interval.ci95_low > 0 or interval.ci95_high < 0
        assert (paired_t(values) < 0.05) == outside


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(values: list[float]) -> None:
    """A method's p is the largest Bonferroni p of any set of methods that it belongs to."""
    num = len(values)
    expected = [0.0] * num
    for size in range(1, num + 1):
        for chosen in itertools.combinations(range(num), size):
            bonferroni = min(1.0, size * min(values[i] for i in chosen))
            for i in chosen:
                expected[i] = max(expected[i], bonferroni)
    assert holm(values) == pytest.approx(expected, abs=1e-12)


def test_a_method_without_a_test_does_not_count_among_the_tests() -> None:
    found = holm([0.02, float("nan"), 0.03])
    assert found[0] == pytest.approx(0.04)
    assert math.isnan(found[1])


def test_test_errors_name_the_problem() -> None:
    with pytest.raises(DataError, match="no difference to test"):
        wilcoxon([])
    with pytest.raises(DataError, match="1 of 2 differences are not finite"):
        paired_t([0.1, float("inf")])
