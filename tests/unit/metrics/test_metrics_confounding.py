"""Cramér's V against scipy and against the formulae spelled out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats.contingency import association, crosstab

from cellray.core.errors import DataError
from cellray.metrics.base import metric
from cellray.metrics.confounding import contingency, cramers_v


def groups(num: int, rows: int, columns: int, seed: int, tie: float = 0.5):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, rows, num)
    second = np.where(rng.random(num) < tie, first % columns, rng.integers(0, columns, num))
    return [f"r{i}" for i in first], [f"c{i}" for i in second]


@pytest.mark.parametrize("seed", range(4))
def test_the_plain_one_is_that_of_scipy(seed):
    first, second = groups(500, 3 + seed, 4, seed)
    table, rows, columns = contingency(first, second)
    expected = crosstab(first, second)
    np.testing.assert_array_equal(table, expected.count)
    assert list(rows) == sorted(set(first))
    assert list(columns) == sorted(set(second))
    assert cramers_v(table, corrected=False) == pytest.approx(
        association(expected.count, method="cramer"), abs=1e-12
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_corrected_one_is_that_of_bergsma(seed):
    table, _, _ = contingency(*groups(300, 5, 3, seed, tie=0.3 * seed))
    n, (r, c) = table.sum(), table.shape
    chi2 = sum(
        (table[i, j] - table[i].sum() * table[:, j].sum() / n) ** 2
        / (table[i].sum() * table[:, j].sum() / n)
        for i in range(r)
        for j in range(c)
    )
    phi = max(0.0, chi2 / n - (r - 1) * (c - 1) / (n - 1))
    rows, columns = r - (r - 1) ** 2 / (n - 1), c - (c - 1) ** 2 / (n - 1)
    expected = math.sqrt(phi / min(rows - 1, columns - 1))
    assert cramers_v(table) == pytest.approx(expected, abs=1e-9)


def test_independent_groupings_of_many_levels_are_near_zero():
    table, _, _ = contingency(*groups(400, 40, 20, 1, tie=0.0))
    assert cramers_v(table, corrected=False) > 0.2
    assert cramers_v(table) < 0.1


def test_the_ends():
    assert cramers_v(np.diag([5, 7, 9])) == pytest.approx(1.0, abs=1e-12)
    assert cramers_v(np.array([[3, 4]])) == 0.0
    assert cramers_v(np.array([[3, 0], [5, 0]])) == 0.0
    assert cramers_v(np.array([[1, 0], [0, 0]])) == 0.0
    assert cramers_v(np.eye(2, dtype=int)) == 0.0  # two cells say nothing
    assert metric("cramers_v.bergsma.v1").title == "Cramér's V"


def test_refusals():
    with pytest.raises(DataError, match="holds no cell"):
        cramers_v(np.zeros((2, 2), dtype=int))
    with pytest.raises(DataError, match="2 values of one grouping but 1 of the other"):
        contingency(["a", "b"], ["x"])
    with pytest.raises(DataError, match="1 of 2 second labels are missing"):
        contingency(["a", "b"], ["x", None])
