"""Search spaces: points are pure functions of (space, seed, trial); bad tables are refused."""

import numpy as np
import pytest

from cellray.core.errors import ConfigError
from cellray.tune.space import grid, parse_space, sample


def test_points_are_reproducible_and_within_bounds():
    space = parse_space(
        {
            "optim": {"lr": {"low": 1e-5, "high": 1e-3, "scale": "log"}},
            "batch.cells_global": [16, 32],
            "train.steps": {"low": 5, "high": 7},
        }
    )
    points = [sample(space, t, seed=1) for t in range(400)]
    assert points == [sample(space, t, seed=1) for t in range(400)]
    assert points[0] != sample(space, 0, seed=2)
    rates = np.log10([p["optim.lr"] for p in points])
    assert rates.min() >= -5
    assert rates.max() <= -3
    assert abs(rates.mean() + 4) < 0.1  # uniform on the logarithmic scale
    assert {p["batch.cells_global"] for p in points} == {16, 32}
    assert {p["train.steps"] for p in points} == {5, 6, 7}
    assert all(isinstance(p["train.steps"], int) for p in points)


def test_a_grid_is_every_combination():
    space = parse_space(
        {
            "a": {"low": 1e-4, "high": 1e-2, "scale": "log", "points": 3},
            "b": [True, False],
            "c": {"low": 1, "high": 3, "points": 9},
        }
    )
    points = grid(space)
    assert len(points) == 3 * 2 * 3  # whole numbers between 1 and 3 are three
    np.testing.assert_allclose(sorted({p["a"] for p in points}), [1e-4, 1e-3, 1e-2])
    assert [p["c"] for p in points[:3]] == [1, 2, 3]
    assert points[0]["b"] is True
    assert len({tuple(p.values()) for p in points}) == 18


def test_an_interval_puts_numbers_back_between_its_bounds():
    lr, steps = parse_space({"a": {"low": 0.1, "high": 0.2}, "b": {"low": 2, "high": 9}}).values()
    assert (lr.nearest(0.3), lr.nearest(0.15), lr.nearest(0.0)) == (0.2, 0.15, 0.1)
    assert (steps.nearest(3.6), steps.nearest(11)) == (4, 9)
    assert isinstance(steps.nearest(3.6), int)
    assert steps.ends() == [2, 9]


@pytest.mark.parametrize(
    ("search", "text"),
    [
        ({}, r"\[search\] is empty"),
        ({"optim.lr": []}, "search.optim.lr is an empty list"),
        ({"optim.lr": 3}, "search.optim.lr = 3; give a list"),
        ({"optim.lr": {"low": 1, "high": 2, "step": 1}}, "give a list of choices"),
        ({"optim.lr": {"low": "a", "high": 2}}, "low and high are numbers"),
        ({"optim.lr": {"low": 2, "high": 1}}, "needs low < high, given 2 and 1"),
        ({"optim.lr": {"low": 0, "high": 1, "scale": "log"}}, "log scale needs low < high"),
        ({"optim.lr": {"low": 0, "high": 1, "points": 1}}, "points = 1; a grid takes 2 or more"),
    ],
)
def test_bad_search_tables(search, text):
    with pytest.raises(ConfigError, match=text):
        parse_space(search)


def test_a_grid_needs_points():
    with pytest.raises(ConfigError, match=r"how many values to take between 0.1 and 1; add points"):
        grid(parse_space({"optim.lr": {"low": 0.1, "high": 1.0}}))
