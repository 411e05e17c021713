"""The long table of results, its aggregate over seeds, and how both are shown as text.

One :class:`ResultRow` is one method x seed x metric. :func:`leaderboard` is computed from rows
alone; nothing in it can be typed by hand.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import pandas as pd

from cellray.bench.stats import Summary, paired_difference, summarise
from cellray.core.errors import DataError, did_you_mean
from cellray.metrics.classification import METRICS

__all__ = [
    "COMPULSORY",
    "FLOOR",
    "HEADLINE",
    "SCHEMA_VERSION",
    "ResultRow",
    "failed_rows",
    "leaderboard",
    "rows_of",
    "to_frame",
]

FLOOR = "majority"
SCHEMA_VERSION = "results_long.v1"
HEADLINE = "macro_f1.union.v1"
COMPULSORY = ("majority", "logistic", "knn")

Provenance = Literal["measured", "reported", "derived"]
Status = Literal["ok", "failed", "timeout", "oom", "skipped"]
MethodFamily = Literal[
    "foundation_ft", "foundation_zs", "from_scratch", "random_init", "baseline", "control"
]


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One method x seed x metric.

    Attributes:
        task: e.g. ``annotation``.
        dataset_id: a name a reader knows; ``synthetic/...`` for made data.
        method: the row's name.
        method_family: what kind of method it is.
        metric_id: versioned, e.g. ``macro_f1.union.v1``; "" only if the run failed.
        value: None unless ``status`` is ok.
        higher_is_better: None for counts.
        seed: the run's seed; None for a reported value.
        seed_scope: what the seed changed; "" says nothing: the spread is then not applicable.
        provenance: measured here, reported by others, or derived by arithmetic.
        reported_source: DOI, table, page; required if reported, empty if not.
        status: ``ok``, or how the run ended.
        error: its message, if it failed.
        subtask: a named part of the test set; "" for all of it.
        dataset_sha256: over cell ids and counts.
        split_id: the split's name.
        split_sha256: over the sorted test ids.
        split_unit: ``cell``, or the obs column held out whole.
        n_cells: cells of the data set; likewise ``n_genes``, and ``n_train``, ``n_val``,
            ``n_test`` of the split, and ``n_items`` that the value averages over.
        config_sha256: over ``params_json``, the resolved configuration.
        n_params_total: of the model; likewise ``n_params_trainable``.
        tuning_budget: trials used to choose the configuration.
        overlap_flag: ``none``, ``partial``, ``full`` or ``unknown`` overlap of test cells with
            pretraining.
        hardware: what it ran on.
        wall_s: seconds from start to predictions.
        cells_per_s: training cells a second.
        run_id: the MLflow run.
        predictions_sha256: over the predictions the value was computed from.
    """

    task: str
    dataset_id: str
    method: str
    method_family: MethodFamily
    metric_id: str = ""
    value: float | None = None
    higher_is_better: bool | None = True
    seed: int | None = None
    seed_scope: str = ""
    provenance: Provenance = "measured"
    reported_source: str = ""
    status: Status = "ok"
    error: str = ""
    subtask: str = ""
    dataset_sha256: str = ""
    dataset_license: str = ""
    split_id: str = ""
    split_sha256: str = ""
    split_unit: str = ""
    n_cells: int | None = None
    n_genes: int | None = None
    n_train: int | None = None
    n_val: int | None = None
    n_test: int | None = None
    n_items: int | None = None
    init: str = ""
    checkpoint_id: str = ""
    config_sha256: str = ""
    params_json: str = ""
    n_params_total: int | None = None
    n_params_trainable: int | None = None
    tuning_budget: int | None = None
    overlap_flag: str = "unknown"
    git_commit: str = ""
    hardware: str = ""
    precision: str = ""
    world_size: int | None = None
    wall_s: float | None = None
    cells_per_s: float | None = None
    started_at: str = ""
    run_id: str = ""
    predictions_uri: str = ""
    predictions_sha256: str = ""
    schema_version: str = SCHEMA_VERSION

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise DataError(f"result row of '{self.method}', seed {self.seed}: {problem}")

    def _problem(self) -> str:
        if self.method_family not in get_args(MethodFamily):
            allowed = ", ".join(get_args(MethodFamily))
            return f"method_family '{self.method_family}' is none of {allowed}"
        if self.status == "ok":
            if self.value is None or not math.isfinite(self.value):
                return (
                    f"{self.metric_id or 'no metric'} = {self.value} although status is ok; give "
                    "a finite value, or the status of a run that failed"
                )
            if not self.metric_id:
                return "a value without metric_id"
        elif self.value is not None:
            return f"status is {self.status} but it has a value ({self.value}); leave it out"
        if (self.provenance == "reported") != bool(self.reported_source):
            return "reported_source is required for reported values and must be empty for others"
        return ""

    @property
    def row_id(self) -> str:
        """16 hex digits over the identifying fields."""
        named = (self.task, self.subtask, self.dataset_id, self.dataset_sha256, self.split_id)
        which = (self.split_sha256, self.method, self.config_sha256, self.seed, self.metric_id)
        text = json.dumps([*named, *which, self.provenance, self.reported_source])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def rows_of(template: ResultRow, scores: Mapping[str, float]) -> list[ResultRow]:
    """One row for each metric of a run.

    Args:
        template: the run's fields, with any metric.
        scores: metric id -> value, as a task's ``score`` gives.
    """
    items = scores.get("n_items", template.n_items)
    return [
        replace(
            template,
            metric_id=name,
            value=float(value),
            status="ok",
            higher_is_better=METRICS[name].higher_is_better if name in METRICS else True,
            n_items=None if items is None else int(items),
        )
        for name, value in scores.items()
    ]


def failed_rows(template: ResultRow, error: str, *, status: Status = "failed") -> list[ResultRow]:
    """The one row of a run that gave no value: it is shown as failed, never as zero."""
    return [replace(template, metric_id="", value=None, status=status, error=error)]


def to_frame(rows: Iterable[ResultRow]) -> pd.DataFrame:
    """The long table: ``row_id`` and every field of :class:`ResultRow`, one row each."""
    names = ["row_id", *(f.name for f in fields(ResultRow))]
    return pd.DataFrame([{"row_id": r.row_id, **asdict(r)} for r in rows], columns=names)


def _check_comparable(rows: Sequence[ResultRow]) -> None:
    """Measured rows of one table must share task, data and split."""
    if not rows:
        raise DataError("no measured result to make a table of")
    for name in ("task", "subtask", "dataset_id", "dataset_sha256", "split_id", "split_sha256"):
        found = sorted({str(getattr(row, name)) for row in rows})
        if len(found) > 1:
            raise DataError(
                f"rows of one table differ in {name}: {', '.join(found[:4])}; make one table each"
            )
    seen: set[tuple[str, int | None, str]] = set()
    for row in rows:
        key = (row.method, row.seed, row.metric_id)
        if key in seen:
            raise DataError(
                f"two rows for method '{row.method}', seed {row.seed}, {row.metric_id or 'failed'};"
                " give each run once"
            )
        seen.add(key)
    good = {(row.method, row.seed) for row in rows if row.status == "ok"}
    for row in rows:
        if row.status != "ok" and (row.method, row.seed) in good:
            raise DataError(
                f"method '{row.method}', seed {row.seed}, is {row.status} and has values too; give "
                "each run once"
            )


def _check_compulsory(rows: Sequence[ResultRow], compulsory: Sequence[str]) -> None:
    there = {row.method for row in rows}
    missing = [name for name in compulsory if name not in there]
    if missing:
        raise DataError(
            f"the table lacks compulsory baselines: {', '.join(missing)}; run them on the same "
            "split (benchmark key baselines) before showing any method"
        )


@dataclass(frozen=True)
class _Method:
    """The measured rows of one method."""

    rows: list[ResultRow]

    @property
    def family(self) -> str:
        return self.rows[0].method_family

    @property
    def varies(self) -> bool:
        """Whether a seed changes anything."""
        return any(row.seed_scope for row in self.rows)

    def values(self, metric: str) -> dict[int, float]:
        """Values by seed, of the runs that worked."""
        return {
            -1 if row.seed is None else row.seed: row.value
            for row in self.rows
            if row.metric_id == metric and row.value is not None
        }

    def summary(self, metric: str) -> Summary:
        values = list(self.values(metric).values())
        if not values:
            return Summary(0, float("nan"))
        if not self.varies and max(values) - min(values) > 1e-9:
            raise DataError(
                f"method '{self.rows[0].method}' says that no seed changes it, yet {metric} runs "
                f"from {min(values):.6g} to {max(values):.6g}; set seed_scope"
            )
        return summarise(values, spread=self.varies)

    def counts(self) -> tuple[int, int]:
        """(seeds that worked, seeds that failed)."""
        bad = {row.seed for row in self.rows if row.status != "ok"}
        return len({row.seed for row in self.rows} - bad), len(bad)

    def mean_of(self, name: str) -> float:
        runs = {row.seed: getattr(row, name) for row in self.rows}
        known = [value for value in runs.values() if value is not None]
        return float(sum(known) / len(known)) if known else float("nan")


def _status(good: int, bad: int, rows: Sequence[ResultRow]) -> str:
    if not bad:
        return "ok"
    how = next(row.status for row in rows if row.status != "ok")
    return how if not good else f"{bad} of {good + bad} seeds {how}"


def _record(method: _Method, metrics: Sequence[str]) -> dict[str, Any]:
    first = method.rows[0]
    good, bad = method.counts()
    record: dict[str, Any] = {
        "method": first.method,
        "provenance": first.provenance,
        "family": first.method_family,
        "status": _status(good, bad, method.rows),
        "n_seeds": good,
        "n_failed": bad,
        "seed_scope": "+".join(sorted({row.seed_scope for row in method.rows} - {""})),
    }
    for metric in metrics:
        record |= _columns(metric, method.summary(metric))
    record["wall_s"] = method.mean_of("wall_s")
    record["cells_per_s"] = method.mean_of("cells_per_s")
    record["overlap_flag"] = first.overlap_flag
    record["error"] = next((row.error for row in method.rows if row.error), "")
    record["reported_source"] = first.reported_source
    return record


def _columns(metric: str, found: Summary) -> dict[str, float]:
    return {
        metric: found.mean,
        f"{metric}.sd": found.sd,
        f"{metric}.ci95_low": found.ci95_low,
        f"{metric}.ci95_high": found.ci95_high,
    }


def _delta(method: _Method, best: _Method | None, headline: str) -> Summary:
    """The paired difference to the best baseline; a baseline no seed changes pairs with any."""
    none = Summary(0, float("nan"))
    if best is None or method.family in ("baseline", "control"):
        return none
    ours, theirs = method.values(headline), best.values(headline)
    if not best.varies and theirs:
        theirs = dict.fromkeys(ours, next(iter(theirs.values())))
    if not set(ours) & set(theirs):
        return none
    return paired_difference(ours, theirs, spread=method.varies or best.varies)


def _group(rows: Iterable[ResultRow]) -> list[_Method]:
    groups: dict[tuple[str, str], list[ResultRow]] = {}
    for row in rows:
        groups.setdefault((row.method, row.reported_source), []).append(row)
    return [_Method(found) for found in groups.values()]


def leaderboard(
    rows: Sequence[ResultRow],
    *,
    headline: str = HEADLINE,
    metrics: Sequence[str] | None = None,
    compulsory: Sequence[str] = COMPULSORY,
) -> pd.DataFrame:
    """One line a method, best first by ``headline``; reported values last, never ranked.

    Columns: ``method``, ``provenance``, ``family``, ``status``, ``n_seeds``, ``n_failed``,
    ``seed_scope``; for each metric its mean under its id and ``.sd`` (n - 1), ``.ci95_low``,
    ``.ci95_high``; ``delta`` (paired difference of the headline to the best baseline) with its
    interval; costs; ``note``. A spread that does not exist (one seed, or a method no seed changes)
    and the values of a failed run are NaN, shown as ``n/a`` and ``failed``.

    Args:
        rows: of one task, data set and split.
        headline: the metric to sort by.
        metrics: which to show; by default all in which higher or lower is better.
        compulsory: methods without which there is no table.

    Raises:
        DataError: a compulsory baseline is missing, rows are not comparable or given twice, a
            method that no seed changes varies, or no row has the headline or a metric asked for.
    """
    measured = [row for row in rows if row.provenance != "reported"]
    _check_compulsory(measured, compulsory)
    _check_comparable(measured)
    found = dict.fromkeys(
        r.metric_id for r in rows if r.metric_id and r.higher_is_better is not None
    )
    if headline not in found:
        raise DataError(f"no row has the metric '{headline}'; there are: {', '.join(found)}")
    there = dict.fromkeys(r.metric_id for r in rows if r.metric_id)  # counts too
    for name in metrics or ():
        if name not in there:
            raise DataError(
                f"no row has the metric '{name}'.{did_you_mean(name, there)} There are: "
                f"{', '.join(there)}"
            )
    shown = list(metrics or found)
    methods = _group(measured)
    lower = any(r.higher_is_better is False for r in rows if r.metric_id == headline)
    sign = 1.0 if lower else -1.0
    ranked = sorted(methods, key=lambda m: _rank_key(m, headline, sign))
    baselines = [m for m in ranked if m.family == "baseline" and m.values(headline)]
    best = baselines[0] if baselines else None
    records = []
    floor = next((m for m in methods if m.rows[0].method == FLOOR), None)
    for method in ranked:
        delta = _columns("delta", _delta(method, best, headline))
        note = {"note": _note(method, floor, headline, sign)}
        records.append(_record(method, shown) | delta | note)
    reported = _group(row for row in rows if row.provenance == "reported")
    records += [_record(method, shown) | {"note": ""} for method in reported]
    return pd.DataFrame(records)


def _note(method: _Method, floor: _Method | None, headline: str, sign: float) -> str:
    """Flags a trained method that is no better than looking at nothing."""
    if floor is None or method is floor:
        return ""
    ours, theirs = method.summary(headline).mean, floor.summary(headline).mean
    return f"not above {FLOOR}" if sign * ours >= sign * theirs else ""


def _rank_key(method: _Method, headline: str, sign: float) -> tuple[bool, float, str]:
    mean = method.summary(headline).mean
    return math.isnan(mean), 0.0 if math.isnan(mean) else sign * mean, method.rows[0].method
