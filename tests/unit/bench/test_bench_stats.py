"""Spread and intervals against formulae by hand and scipy."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from cellray.bench.stats import paired_difference, summarise
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
