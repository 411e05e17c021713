"""The rows of one method of one table: its values by seed, its aggregate and its costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from cellray.bench.rows import ResultRow
from cellray.bench.stats import Summary, paired_difference, summarise
from cellray.core.errors import DataError

__all__ = ["Method", "difference", "grouped", "seed_differences"]

_NAN = float("nan")
_SAME = 1e-9


@dataclass(frozen=True)
class Method:
    """All rows of one method (of one source, if reported).

    Attributes:
        rows: at least one.
    """

    rows: list[ResultRow]

    @property
    def name(self) -> str:
        """As in the table."""
        return self.rows[0].method

    @property
    def family(self) -> str:
        """What kind of method it is."""
        return self.rows[0].method_family

    @property
    def is_rival(self) -> bool:
        """Whether it takes part in a comparison at all: controls only frame it."""
        return self.family != "control"

    @cached_property
    def varies(self) -> bool:
        """Whether a seed changes anything."""
        return any(row.seed_scope for row in self.rows if row.status == "ok")

    def values(self, metric: str) -> dict[int, float]:
        """Values by seed, of the runs that worked."""
        return {
            -1 if row.seed is None else row.seed: row.value
            for row in self.rows
            if row.metric_id == metric and row.value is not None
        }

    def mean(self, metric: str) -> float:
        """Over seeds; NaN if no run has it."""
        values = self.values(metric).values()
        return math.fsum(values) / len(values) if values else _NAN

    def summary(self, metric: str) -> Summary:
        """Mean and spread over seeds.

        Raises:
            DataError: no seed is said to change the method, but its values differ.
        """
        values = list(self.values(metric).values())
        if not values:
            return Summary(0, _NAN)
        if not self.varies and max(values) - min(values) > _SAME:
            raise DataError(
                f"method '{self.name}' says that no seed changes it, yet {metric} runs "
                f"from {min(values):.6g} to {max(values):.6g}; set seed_scope"
            )
        return summarise(values, spread=self.varies)

    def unit_interval(self, metric: str) -> tuple[float, float]:
        """The interval over test units: the mean over runs of each end; NaN if there is none."""
        ends = [
            (row.unit_ci95_low, row.unit_ci95_high)
            for row in self.rows
            if row.metric_id == metric
            and row.unit_ci95_low is not None
            and row.unit_ci95_high is not None
        ]
        if not ends:
            return _NAN, _NAN
        return math.fsum(e[0] for e in ends) / len(ends), math.fsum(e[1] for e in ends) / len(ends)

    @cached_property
    def counts(self) -> tuple[int, int]:
        """(runs that worked, runs that failed)."""
        bad = {row.seed for row in self.rows if row.status != "ok"}
        return len({row.seed for row in self.rows} - bad), len(bad)

    @property
    def status(self) -> str:
        """``ok``, how all runs ended, or ``1 of 3 seeds failed``."""
        good, bad = self.counts
        if not bad:
            return "ok"
        how = sorted({row.status for row in self.rows if row.status != "ok"})
        said = " or ".join(how)
        return said if not good else f"{bad} of {good + bad} seeds {said}"

    def mean_of(self, name: str) -> float:
        """The mean over runs of a numeric field; NaN if no run knows it."""
        runs = {row.seed: getattr(row, name) for row in self.rows}
        known = [float(value) for value in runs.values() if value is not None]
        return math.fsum(known) / len(known) if known else _NAN

    def words_of(self, name: str) -> str:
        """The different values of a field of text, of runs that worked if any did."""
        rows = [row for row in self.rows if row.status == "ok"] or self.rows
        return "+".join(sorted({str(getattr(row, name)) for row in rows} - {""}))

    @property
    def run_ids(self) -> tuple[str, ...]:
        """MLflow runs, in order of seeds."""
        ordered = sorted(self.rows, key=lambda row: -1 if row.seed is None else row.seed)
        return tuple(dict.fromkeys(row.run_id for row in ordered if row.run_id))


def _place(row: ResultRow) -> tuple[str, str, int, str]:
    seed = -1 if row.seed is None else row.seed
    return row.method, row.reported_source, seed, row.metric_id


def grouped(rows: Iterable[ResultRow]) -> list[Method]:
    """Rows by method and, if reported, by source; nothing depends on the order they came in."""
    groups: dict[tuple[str, str], list[ResultRow]] = {}
    for row in sorted(rows, key=_place):
        groups.setdefault((row.method, row.reported_source), []).append(row)
    return [Method(found) for found in groups.values()]


def _paired(first: Method, second: Method, metric: str) -> tuple[dict[int, float], ...]:
    """Values of both; one that no seed changes pairs with any seed of the other."""
    ours, theirs = first.values(metric), second.values(metric)
    if not second.varies and theirs and ours:
        theirs = dict.fromkeys(ours, next(iter(theirs.values())))
    elif not first.varies and ours and theirs:
        ours = dict.fromkeys(theirs, next(iter(ours.values())))
    return ours, theirs


def seed_differences(first: Method, second: Method, metric: str) -> Sequence[float]:
    """``first - second`` over the seeds both have, empty if there are none.

    Two methods that no seed changes give one difference: repeating it is no evidence.
    """
    ours, theirs = _paired(first, second, metric)
    found = [ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))]
    return found if first.varies or second.varies else found[:1]


def difference(first: Method, second: Method, metric: str) -> Summary:
    """The paired difference of two methods; NaN where no seed is shared."""
    ours, theirs = _paired(first, second, metric)
    if not set(ours) & set(theirs):
        return Summary(0, _NAN)
    return paired_difference(ours, theirs, spread=first.varies or second.varies)
