"""Search spaces: what ``[search]`` may say, and the values that an axis of it has."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cellray.core.draw import Draw
from cellray.core.errors import ConfigError

__all__ = ["Axis", "Choice", "Interval", "Space", "grid", "parse_space", "sample"]


@dataclass(frozen=True)
class Choice:
    """One of a list of values."""

    values: tuple[Any, ...]
    log = False

    def at(self, u: float) -> Any:
        """The value at quantile ``u`` in [0, 1)."""
        return self.values[int(u * len(self.values))]

    def size(self) -> int:
        """How many different values there are."""
        return len(self.all())

    def all(self) -> list[Any]:
        """Each value once."""
        return list({json.dumps(value, sort_keys=True): value for value in self.values}.values())

    def ends(self) -> list[Any]:
        """Every value: what a configuration must be able to take."""
        return list(self.values)

    def grid(self, key: str) -> list[Any]:
        """The values a grid walks, each once."""
        return self.all()

    def nearest(self, value: Any) -> Any:
        """``value``, which is one of the list."""
        return value


@dataclass(frozen=True)
class Interval:
    """A number between two bounds, uniform on a linear or logarithmic scale.

    Attributes:
        low: smallest value.
        high: largest value.
        log: logarithmic scale.
        integer: whole numbers only.
        points: how many values a grid takes of it, the bounds among them; 0: not for a grid.
    """

    low: float
    high: float
    log: bool
    integer: bool
    points: int = 0

    def at(self, u: float) -> Any:
        """The number at quantile ``u`` in [0, 1)."""
        if self.integer and not self.log:
            return int(self.low) + int(u * (int(self.high) - int(self.low) + 1))
        return self._between(u)

    def _between(self, u: float) -> Any:
        if self.log:
            value = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + u * (self.high - self.low)
        return self.nearest(value)

    def size(self) -> int:
        """How many values there are; 0 where they cannot be counted."""
        return int(self.high) - int(self.low) + 1 if self.integer else 0

    def all(self) -> list[Any]:
        """Each whole number."""
        return list(range(int(self.low), int(self.high) + 1))

    def ends(self) -> list[Any]:
        """Both bounds: what a configuration must be able to take."""
        return [self.nearest(self.low), self.nearest(self.high)]

    def grid(self, key: str) -> list[Any]:
        """The values a grid walks: evenly spaced on the scale, without repeats.

        Raises:
            ConfigError: the axis says no number of points.
        """
        if self.points < 2:
            raise ConfigError(
                f"search.{key}: a grid needs to know how many values to take between "
                f"{self.low:g} and {self.high:g}; add points = 5, or list the values"
            )
        values = [self._between(i / (self.points - 1)) for i in range(self.points)]
        return list(dict.fromkeys(values))

    def nearest(self, value: float) -> Any:
        """The value of the axis that is nearest to a number."""
        inside = min(max(value, self.low), self.high)
        return round(inside) if self.integer else float(inside)


Axis = Choice | Interval
Space = Mapping[str, Axis]


def parse_space(search: Mapping[str, Any]) -> dict[str, Axis]:
    """Read a ``[search]`` table.

    A list is a choice; ``{ low = 1e-5, high = 1e-3, scale = "log" }`` an interval (whole numbers
    when both bounds are), with ``points = 5`` if a grid is to walk it.

    Raises:
        ConfigError: an empty table or list, unknown keys, or bounds that do not fit.
    """
    flat = _flat(search)
    if not flat:
        raise ConfigError('[search] is empty; name at least one key, e.g. "optim.lr" = [1e-4]')
    return {key: _axis(key, value) for key, value in flat.items()}


def _flat(search: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables (``optim.lr`` unquoted in TOML) as key paths."""
    flat: dict[str, Any] = {}
    for key, value in search.items():
        nested = isinstance(value, Mapping) and not {"low", "high"} & set(value)
        if nested:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _axis(key: str, value: Any) -> Axis:
    if isinstance(value, list):
        if not value:
            raise ConfigError(f"search.{key} is an empty list")
        return Choice(tuple(value))
    if not isinstance(value, Mapping) or set(value) - {"low", "high", "scale", "points"}:
        raise ConfigError(
            f"search.{key} = {value!r}; give a list of choices, or a table with low, high and "
            'optionally scale = "log" or "linear" and points (of a grid)'
        )
    low, high, scale = value.get("low"), value.get("high"), value.get("scale", "linear")
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (low, high))
    if not numbers or scale not in ("log", "linear"):
        raise ConfigError(f'search.{key}: low and high are numbers, scale is "log" or "linear"')
    assert low is not None
    assert high is not None
    if low >= high or (scale == "log" and low <= 0):
        raise ConfigError(f"search.{key}: {scale} scale needs low < high, given {low} and {high}")
    points = value.get("points", 0)
    if "points" in value and (not isinstance(points, int) or points < 2):
        raise ConfigError(f"search.{key}: points = {points!r}; a grid takes 2 or more")
    both_whole = isinstance(low, int) and isinstance(high, int)
    return Interval(float(low), float(high), scale == "log", both_whole, points)


def sample(space: Space, trial: int, *, seed: int) -> dict[str, Any]:
    """The random point of trial ``trial``: a pure function of (space, seed, trial)."""
    draw = Draw(seed)
    return {
        key: axis.at(float(draw.uniform(f"search.{key}", trial))) for key, axis in space.items()
    }


def grid(space: Space) -> list[dict[str, Any]]:
    """All combinations, the last key changing fastest.

    Raises:
        ConfigError: an interval that says no number of points.
    """
    values = [axis.grid(key) for key, axis in space.items()]
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*values)]
