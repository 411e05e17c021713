"""Proposals: pure functions of what has been seen, and drawn to where the metric is good."""

import numpy as np
import pytest

from cellray.core.errors import ConfigError
from cellray.runs import build_run
from cellray.tune.propose import Seen, fixed_points, number_of_trials, propose
from cellray.tune.space import parse_space, sample

SPACE = parse_space(
    {
        "lr": {"low": 1e-6, "high": 1.0, "scale": "log"},
        "shape": [[1, 2], [3], "none"],
        "depth": {"low": 1, "high": 6},
    }
)


def value(point):
    """Best at lr = 1e-3, the second shape, whatever the depth."""
    return (np.log10(point["lr"]) + 3) ** 2 + 3 * (point["shape"] != [3])


def search(trials, seed):
    seen = []
    for trial in range(trials):
        point = propose(SPACE, trial, seen, seed=seed, mode="min")
        seen.append(Seen(point, float(value(point)), ended=True))
    return seen


def test_proposals_go_where_the_metric_is_good_and_beat_random_draws():
    ours, drawn = [], []
    for seed in range(3):
        seen = search(30, seed)
        assert all(1e-6 <= s.point["lr"] <= 1 and 1 <= s.point["depth"] <= 6 for s in seen)
        assert all(s.point["shape"] in ([1, 2], [3], "none") for s in seen)
        ours.append(np.mean([s.value for s in seen[15:]]))
        drawn.append(np.mean([value(sample(SPACE, t, seed=seed)) for t in range(15, 30)]))
    assert np.mean(ours) < 0.5 * np.mean(drawn)


def test_a_proposal_depends_on_what_was_seen_and_on_nothing_else():
    seen = search(20, 0)
    seen.append(Seen(seen[0].point, None, ended=False))
    seen.append(Seen(seen[1].point, None, ended=True))  # failed
    first = propose(SPACE, 30, seen, seed=5, mode="min")
    assert first == propose(SPACE, 30, seen, seed=5, mode="min")
    assert first != propose(SPACE, 31, seen, seed=5, mode="min")
    assert first != propose(SPACE, 30, seen, seed=6, mode="min")
    flipped = propose(SPACE, 30, seen, seed=5, mode="max")
    assert first != flipped


def sweep(**over):
    return build_run("tune", {"base": "x.toml", "name": "s", "search": {"a": [1, 2, 3]}} | over)


def test_how_many_trials_there_are():
    assert number_of_trials(sweep()) == 3
    assert number_of_trials(sweep(search={"a": {"low": 0.0, "high": 1.0}})) == 4
    assert number_of_trials(sweep(trials=7)) == 7
    assert number_of_trials(sweep(algorithm="grid")) == 3
    assert fixed_points(sweep(algorithm="grid")) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert fixed_points(sweep(algorithm="optuna")) is None
    with pytest.raises(ConfigError, match=r"trials = 2, but the grid of \[search\] has 3 points"):
        number_of_trials(sweep(algorithm="grid", trials=2))


def test_a_random_sweep_tries_no_point_twice():
    space = {"a": [1, 2, 3], "b": {"low": 1, "high": 4}, "c": [{"x": 1}, {"x": 2}]}
    for seed in range(5):
        drawn = fixed_points(sweep(search=space, trials=24, seed=seed))
        assert len({str(point) for point in drawn}) == 24
        assert drawn[:9] == fixed_points(sweep(search=space, trials=9, seed=seed))
    with pytest.raises(ConfigError, match=r"trials = 25, but \[search\] has only 24 points"):
        fixed_points(sweep(search=space, trials=25))
    assert (
        len(fixed_points(sweep(search=space | {"d": {"low": 0.0, "high": 1.0}}, trials=90))) == 90
    )


def test_members_of_a_population_may_begin_alike():
    members = fixed_points(sweep(trials=7, scheduler="pbt"))
    assert len(members) == 7
    assert {member["a"] for member in members} == {1, 2, 3}


def test_trials_are_compared_on_validation_cells_only():
    with pytest.raises(ConfigError, match="metric = 'test/accuracy.v1': trials are compared on v"):
        sweep(metric="test/accuracy.v1")


def test_population_based_training_cannot_follow_optuna():
    with pytest.raises(ConfigError, match="cannot follow algorithm = 'optuna'"):
        sweep(algorithm="optuna", scheduler="pbt")


@pytest.mark.timeout(60)
def test_values_that_repeat_and_spaces_that_are_too_narrow():
    """No search for points that are not there, however the space hides it."""
    assert len(fixed_points(sweep(search={"a": [1, 1]}))) == 1
    with pytest.raises(ConfigError, match="has only 2 points"):
        fixed_points(sweep(search={"a": [1, 2, 1]}, trials=3))
    assert len(fixed_points(sweep(search={"a": [1, 1]}, scheduler="pbt", trials=4))) == 4
    narrow = {"a": {"low": 1.0, "high": 1.0000000000000002}}
    with pytest.raises(ConfigError, match=r"trials = 4, but only [12] different points"):
        fixed_points(sweep(search=narrow, trials=4))
    wide = {"a": {"low": 1, "high": 3000, "scale": "log"}}
    every = fixed_points(sweep(search=wide, trials=3000))
    assert sorted(point["a"] for point in every) == list(range(1, 3001))
    assert fixed_points(sweep(search=wide, trials=2500)) == every[:2500]
