"""What values a trial gets: drawn, the next of a grid, or proposed from the trials before it."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cellray.core.draw import Draw
from cellray.core.errors import ConfigError
from cellray.tune.space import Axis, Choice, Space, grid, parse_space, sample

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from cellray.runs import TuneRun

__all__ = ["Seen", "fixed_points", "number_of_trials", "propose"]

_DEFAULT_TRIALS = 4
_REPEATS = 30  # draws in a row without a new point: the rest is listed
_MOST_LISTED = 1_000_000
_RANDOM_FIRST = 4  # trials before a model of the results is worth having


@dataclass(frozen=True)
class Seen:
    """A trial that has been proposed already.

    Attributes:
        point: its values.
        value: its metric; None while it has reported nothing.
        ended: False for a trial that still runs, or waits to go on.
    """

    point: dict[str, Any]
    value: float | None
    ended: bool


def number_of_trials(run: TuneRun) -> int:
    """How many trials the sweep has.

    Raises:
        ConfigError: a grid with another number of trials than it has points.
    """
    if run.algorithm != "grid":
        points = _points(parse_space(run.search))
        few = run.algorithm == "random" and run.scheduler != "pbt" and points
        return run.trials or (min(points, _DEFAULT_TRIALS) if few else _DEFAULT_TRIALS)
    size = len(grid(parse_space(run.search)))
    if run.trials not in (0, size):
        raise ConfigError(
            f"trials = {run.trials}, but the grid of [search] has {size} points; leave trials out, "
            'or choose algorithm = "random" or "optuna"'
        )
    return size


def fixed_points(run: TuneRun) -> list[dict[str, Any]] | None:
    """The points of all trials where they are known beforehand; None for Optuna's."""
    space = parse_space(run.search)
    if run.algorithm == "grid":
        number_of_trials(run)
        return grid(space)
    if run.algorithm == "random":
        return _drawn(run, space)
    return None


def _points(space: Space) -> int:
    """How many points there are; 0 where they cannot be counted."""
    sizes = [axis.size() for axis in space.values()]
    return math.prod(sizes) if all(sizes) else 0


def _drawn(run: TuneRun, space: Space) -> list[dict[str, Any]]:
    """Random points without repeats; members of a population may be alike, they part later.

    Raises:
        ConfigError: the space has fewer points than there are trials.
    """
    num, most = number_of_trials(run), _points(space)
    if 0 < most < num and run.scheduler != "pbt":
        raise ConfigError(
            f"trials = {num}, but [search] has only {most} points; give that many, or choose "
            'algorithm = "grid"'
        )
    points: dict[str, dict[str, Any]] = {}
    again = 0  # draws in a row that gave nothing new: a function of the draws alone, so a sweep
    for draw in itertools.count():  # that is made longer has the points it had
        if len(points) == num or again == _REPEATS:
            break
        point = sample(space, draw, seed=run.seed)
        key = json.dumps(point, sort_keys=True)
        again = again + 1 if key in points else 0
        points.setdefault(key, point)
    found = list(points.values())
    if len(found) < num and 0 < most <= _MOST_LISTED:
        found += _others(space, set(points), run.seed)
    if len(found) < num and run.scheduler == "pbt":
        found = list(itertools.islice(itertools.cycle(found), num))
    if len(found) < num:
        raise ConfigError(
            f"trials = {num}, but only {len(found)} different points of [search] were found; "
            "give fewer trials or wider intervals"
        )
    return found[:num]


def _others(space: Space, known: set[str], seed: int) -> list[dict[str, Any]]:
    """The points of a finite space that are not known, in an order of the seed's own."""
    every = itertools.product(*(axis.all() for axis in space.values()))
    points = [dict(zip(space, values, strict=True)) for values in every]
    left = [point for point in points if json.dumps(point, sort_keys=True) not in known]
    order = np.argsort(Draw(seed).bits("search.others", np.arange(len(left))), kind="stable")
    return [left[i] for i in order]


def propose(
    space: Space, trial: int, seen: Sequence[Seen], *, seed: int, mode: str
) -> dict[str, Any]:
    """The point Optuna's TPE sampler proposes for a trial.

    The tree-structured Parzen estimator is Bergstra et al. 2011 (Algorithms for hyper-parameter
    optimization, NeurIPS 24); trials that still run count as bad ones, so that those running at a
    time differ. A pure function of its arguments: a sweep that goes on proposes what it would have.

    Args:
        space: of the sweep.
        trial: its number.
        seen: the trials before it.
        seed: of the sweep.
        mode: ``min`` or ``max``.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    key = int(Draw(seed).bits("search.optuna", [trial])[0]) & 0x7FFF_FFFF
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=key, n_startup_trials=_RANDOM_FIRST, constant_liar=True
        )
    study = optuna.create_study(
        sampler=sampler, direction="minimize" if mode == "min" else "maximize"
    )
    distributions = {key: _distribution(axis) for key, axis in space.items()}
    for one in seen:
        params = {key: _coded(axis, one.point[key]) for key, axis in space.items()}
        if one.ended and one.value is not None:
            state, value = TrialState.COMPLETE, one.value
        else:
            state, value = (TrialState.FAIL if one.ended else TrialState.RUNNING), None
        study.add_trial(
            create_trial(state=state, value=value, params=params, distributions=distributions)
        )
    asked = study.ask(distributions).params
    return {key: _decoded(axis, asked[key]) for key, axis in space.items()}


def _distribution(axis: Axis) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(axis, Choice):
        return CategoricalDistribution(list(range(len(axis.values))))
    if axis.integer:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _coded(axis: Axis, value: Any) -> Any:
    """A value as Optuna knows it: a choice by its place in the list, since it may be a table."""
    return axis.values.index(value) if isinstance(axis, Choice) else value


def _decoded(axis: Axis, value: Any) -> Any:
    return axis.values[value] if isinstance(axis, Choice) else axis.nearest(value)
