"""Mean, spread and interval over seeds, paired tests.

Seeds and test units are two sources of variance and are never mixed: an interval over seeds says
what training by chance does, an interval over donors what another choice of donors would do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from cellray.core.errors import DataError

__all__ = [
    "Summary",
    "holm",
    "paired_difference",
    "paired_t",
    "summarise",
    "wilcoxon",
]

_NAN = float("nan")
_SAME = 1e-12  # differences below it are rounding


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


def _differences(values: Sequence[float]) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise DataError("no difference to test")
    if not np.isfinite(array).all():
        raise DataError(
            f"{int((~np.isfinite(array)).sum())} of {len(array)} differences are not finite"
        )
    array[np.abs(array) < _SAME] = 0.0
    return array


def wilcoxon(differences: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test, exact at any size and with ties.

    Zero differences are left out (Wilcoxon's own rule); tied sizes share their mean rank. The
    distribution is over all 2^n signs, counted by dynamic programming, so that the p of five
    seeds is never below 2 / 2^5 = 0.0625: nothing is claimed that the number of seeds cannot
    support.

    Args:
        differences: one for each seed.

    Raises:
        DataError: no difference, or one that is not a finite number.
    """
    array = _differences(differences)
    array = array[array != 0]
    if not len(array):
        return 1.0
    ranks = np.rint(2 * stats.rankdata(np.round(np.abs(array), 12))).astype(np.int64)
    counts = np.zeros(int(ranks.sum()) + 1)
    counts[0] = 1.0
    for rank in ranks:  # of all signs: how often is twice the sum of positive ranks this?
        counts[rank:] += counts[:-rank].copy()
    share = counts / counts.sum()
    found = int(ranks[array > 0].sum())
    return float(min(1.0, 2 * min(share[: found + 1].sum(), share[found:].sum())))


def paired_t(differences: Sequence[float]) -> float:
    """Two-sided p of the paired t test, the one that belongs to the interval of the difference.

    Args:
        differences: one for each seed.

    Returns:
        NaN for fewer than two, or where all are the same but for 0: values without spread are no
        evidence of one; 1 where all are 0.

    Raises:
        DataError: no difference, or one that is not a finite number.
    """
    array = _differences(differences)
    if len(array) < 2:
        return _NAN
    mean, sd = float(array.mean()), float(array.std(ddof=1))
    if sd < _SAME:
        return 1.0 if abs(mean) < _SAME else _NAN
    return float(2 * stats.t.sf(abs(mean) / (sd / len(array) ** 0.5), len(array) - 1))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment; a NaN is no test and stays NaN.

    Args:
        values: p of each method.
    """
    array = np.asarray(values, dtype=np.float64)
    adjusted = np.full(len(array), _NAN)
    tested = np.flatnonzero(~np.isnan(array))
    order = tested[np.argsort(array[tested], kind="stable")]
    highest = 0.0
    for done, place in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - done) * float(array[place])))
        adjusted[place] = highest
    return [float(value) for value in adjusted]
