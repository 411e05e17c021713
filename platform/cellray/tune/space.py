"""Search spaces: what ``[search]`` may say, and points drawn from it by keyed draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cellray.core.draw import Draw
from cellray.core.errors import ConfigError

__all__ = ["Choice", "Interval", "parse_space", "sample"]


@dataclass(frozen=True)
class Choice:
    """One of a list of values."""

    values: tuple[Any, ...]

    def at(self, u: float) -> Any:
        """The value at quantile ``u`` in [0, 1)."""
        return self.values[int(u * len(self.values))]


@dataclass(frozen=True)
class Interval:
    """A number between two bounds, uniform on a linear or logarithmic scale."""

    low: float
    high: float
    log: bool
    integer: bool

    def at(self, u: float) -> Any:
        """The number at quantile ``u`` in [0, 1)."""
        if self.integer and not self.log:
            return int(self.low) + int(u * (int(self.high) - int(self.low) + 1))
        if self.log:
            value = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + u * (self.high - self.low)
        return round(value) if self.integer else value


def parse_space(search: Mapping[str, Any]) -> dict[str, Choice | Interval]:
    """Read a ``[search]`` table.

    A list is a choice; ``{ low = 1e-5, high = 1e-3, scale = "log" }`` an interval (whole numbers
    when both bounds are).

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


def _axis(key: str, value: Any) -> Choice | Interval:
    if isinstance(value, list):
        if not value:
            raise ConfigError(f"search.{key} is an empty list")
        return Choice(tuple(value))
    if not isinstance(value, Mapping) or set(value) - {"low", "high", "scale"}:
        raise ConfigError(
            f"search.{key} = {value!r}; give a list of choices, or a table with low, high and "
            'optionally scale = "log" or "linear"'
        )
    low, high, scale = value.get("low"), value.get("high"), value.get("scale", "linear")
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (low, high))
    if not numbers or scale not in ("log", "linear"):
        raise ConfigError(f'search.{key}: low and high are numbers, scale is "log" or "linear"')
    assert low is not None
    assert high is not None
    if low >= high or (scale == "log" and low <= 0):
        raise ConfigError(f"search.{key}: {scale} scale needs low < high, given {low} and {high}")
    both_whole = isinstance(low, int) and isinstance(high, int)
    return Interval(float(low), float(high), scale == "log", both_whole)


def sample(space: Mapping[str, Choice | Interval], trial: int, *, seed: int) -> dict[str, Any]:
    """The point of trial ``trial``: a pure function of (space, seed, trial)."""
    draw = Draw(seed)
    return {
        key: axis.at(float(draw.uniform(f"search.{key}", trial))) for key, axis in space.items()
    }
