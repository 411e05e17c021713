"""Search spaces: points are pure functions of (space, seed, trial); bad tables are refused."""

import numpy as np
import pytest

from cellray.core.errors import ConfigError
from cellray.tune.space import parse_space, sample


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
    ],
)
def test_bad_search_tables(search, text):
    with pytest.raises(ConfigError, match=text):
        parse_space(search)
