"""Mean, spread and interval over seeds, and paired differences between methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from cellray.core.errors import DataError

__all__ = ["Summary", "paired_difference", "summarise"]

_NAN = float("nan")


@dataclass(frozen=True)
class Summary:
    """A sample in five numbers; what does not exist (spread of one value) is NaN, never 0.

    Attributes:
        num: values.
        mean: arithmetic mean.
        sd: standard deviation with n - 1.
        ci95_low: ``mean - t(0.975, n - 1) sd / sqrt(n)``.
        ci95_high: the upper end of the same.
    """

    num: int
    mean: float
    sd: float = _NAN
    ci95_low: float = _NAN
    ci95_high: float = _NAN


def summarise(values: Sequence[float], *, spread: bool = True) -> Summary:
    """Summarise values of one method over seeds.

    Args:
        values: one per seed.
        spread: False for a method no seed changes: its spread is not applicable.

    Raises:
        DataError: no value, or one that is not a finite number.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise DataError("no value to summarise")
    if not np.isfinite(array).all():
        raise DataError(f"{int((~np.isfinite(array)).sum())} of {len(array)} values are not finite")
    num, mean = len(array), float(array.mean())
    if num < 2 or not spread:
        return Summary(num, mean)
    sd = float(array.std(ddof=1))
    half = float(stats.t.ppf(0.975, num - 1)) * sd / num**0.5
    return Summary(num, mean, sd, mean - half, mean + half)


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float], *, spread: bool = True
) -> Summary:
    """``first - second`` over the seeds both have.

    Args:
        first: seed -> value.
        second: seed -> value, on the same split.
        spread: False if no seed changes either method.

    Raises:
        DataError: no seed in common.
    """
    common = sorted(set(first) & set(second))
    if not common:
        raise DataError(
            f"no seed in common to pair: {sorted(first)} and {sorted(second)}; run both methods "
            "with the same seeds"
        )
    return summarise([first[seed] - second[seed] for seed in common], spread=spread)
