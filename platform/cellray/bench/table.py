"""The leaderboard: the long table's aggregate over seeds, with what a reader needs to judge it.

It is computed from rows alone; nothing in it can be typed by hand. Two different spreads never
share a column: ``.sd`` and ``.ci95_...`` are over seeds, ``.unit_ci95_...`` over test units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from cellray.bench.methods import Method, difference, grouped, seed_differences
from cellray.bench.rows import (
    SCHEMA_VERSION,
    MethodFamily,
    ResultRow,
    failed_rows,
    row_from,
    rows_of,
    scores_of,
    to_frame,
)
from cellray.bench.rules import (
    FLOOR,
    ceiling_of,
    check_comparable,
    check_compulsory,
    check_controls,
    check_own_controls,
    check_reported,
    flags,
    floor_of,
)
from cellray.bench.stats import Summary, holm, paired_t, wilcoxon
from cellray.core.errors import DataError, did_you_mean

__all__ = [
    "COMPULSORY",
    "FLOOR",
    "HEADLINE",
    "SCHEMA_VERSION",
    "MethodFamily",
    "ResultRow",
    "control_scaled",
    "failed_rows",
    "leaderboard",
    "row_from",
    "rows_of",
    "scores_of",
    "to_frame",
]

HEADLINE = "macro_f1.union.v1"
COMPULSORY = ("majority", "logistic", "knn")

_NAN = float("nan")
_LEVEL = 0.05
_SAME = 1e-9
_COSTS = ("wall_s", "gpu_hours", "cpu_hours", "cells_per_s")
_SPREADS = {"sd": "a standard deviation", "ci95_half_width": "half a 95 % interval"}
_NO_DELTA = ("baseline", "control")


def leaderboard(
    rows: Sequence[ResultRow],
    *,
    headline: str = HEADLINE,
    metrics: Sequence[str] | None = None,
    compulsory: Sequence[str] = COMPULSORY,
    own_controls: bool = True,
) -> pd.DataFrame:
    """One line a method, best first by ``headline``; reported values last, never ranked.

    Columns: ``method``, ``provenance``, ``family``, ``base_method``, ``status``, ``n_seeds``,
    ``n_failed``, ``seed_scope``; for each metric its mean under its id and ``.sd`` (n - 1),
    ``.ci95_low``, ``.ci95_high`` (t, over seeds), ``.unit_ci95_low``, ``.unit_ci95_high``
    (bootstrap over test units, the mean over runs of each end), ``.scaled`` (between the controls)
    and ``.best`` (True: the best, or not separable from it: the paired t test over seeds with Holm
    over methods, or where no test over seeds exists overlapping unit intervals); ``rank``;
    ``delta`` (paired difference of the headline to ``delta.baseline``, the best baseline) with its
    interval, ``delta.p`` (exact Wilcoxon) and ``delta.p_t`` (paired t), both over seeds, each with
    Holm over methods under ``..._holm``; costs, means over runs;
    ``overlap_flag``, ``overlap_fraction``, ``tuning_budget``, ``run_ids``, ``gap`` (measured minus
    reported, on a reported row), ``note`` (flags). A spread that does not exist (one seed, or a
    method no seed changes) and the values of a failed run are NaN, shown as ``n/a`` and
    ``failed``. ``attrs`` of the frame hold headline, task, dataset_id, split_id and synthetic.

    Args:
        rows: of one task, data set and split.
        headline: the metric to sort by.
        metrics: which to show; by default all in which higher or lower is better.
        compulsory: methods without which there is no table.
        own_controls: demand beside each pretrained method its rows from scratch and with random
            weights (those whose ``base_method`` names it).

    Raises:
        DataError: a compulsory baseline or control is missing, controls are out of order, rows
            are not comparable or given twice, a method that no seed changes varies, no row has
            the headline or a metric asked for, or reported values of other data.
    """
    measured = [row for row in rows if row.provenance != "reported"]
    reported = [row for row in rows if row.provenance == "reported"]
    check_compulsory(measured, compulsory)
    check_comparable(measured)
    check_reported(measured, reported)
    if own_controls:
        check_own_controls(measured)
    shown = _shown(rows, headline, metrics)
    signs = {name: _sign(rows, name) for name in {*shown, headline}}
    sign = signs[headline]
    methods = sorted(grouped(measured), key=lambda m: _rank_key(m, headline, sign))
    check_controls(methods, headline, sign)
    deltas = _deltas(methods, headline)
    ranks = _ranks(methods, headline)
    ordered = {r.metric_id for r in measured if r.higher_is_better is not None}
    best = {name: _best(methods, name, signs[name]) if name in ordered else set() for name in shown}
    records = []
    for method in methods:
        marks = {f"{name}.best": method.name in best[name] for name in shown}
        scaled = {f"{name}.scaled": _scaled(method, methods, name) for name in shown}
        note = {"note": "; ".join(flags(method, methods, headline, sign))}
        rank = {"rank": ranks.get(method.name, _NAN)}
        own = _record(method, shown) | deltas[method.name] | marks | scaled
        records.append(own | rank | {"gap": _NAN} | note)
    others = sorted(grouped(reported), key=lambda m: _rank_key(m, headline, sign))
    records += [_reported_record(m, methods, shown, headline) for m in others]
    board = pd.DataFrame(records)
    first = measured[0]
    board.attrs = {
        "headline": headline,
        "task": first.task,
        "dataset_id": first.dataset_id,
        "split_id": first.split_id,
        "split_sha256": first.split_sha256,
        "synthetic": first.is_synthetic,
    }
    return board


def _shown(rows: Sequence[ResultRow], headline: str, metrics: Sequence[str] | None) -> list[str]:
    """The metrics of the table, measured ones first; the same for any order of the rows."""
    found = dict.fromkeys(
        r.metric_id for r in rows if r.metric_id and r.higher_is_better is not None
    )
    if not found:
        errors = dict.fromkeys(r.error for r in rows if r.error)
        raise DataError(f"every row failed, so there is nothing to show: {'; '.join(errors)[:500]}")
    if headline not in found:
        raise DataError(f"no row has the metric '{headline}'; there are: {', '.join(found)}")
    there = dict.fromkeys(r.metric_id for r in rows if r.metric_id)  # counts too
    for name in metrics or ():
        if name not in there:
            raise DataError(
                f"no row has the metric '{name}'.{did_you_mean(name, there)} There are: "
                f"{', '.join(there)}"
            )
    return list(metrics or sorted(found))


def _sign(rows: Sequence[ResultRow], metric: str) -> float:
    """1 where lower is better, -1 where higher is.

    Raises:
        DataError: rows do not agree.
    """
    said = {r.higher_is_better for r in rows if r.metric_id == metric}
    if len(said) > 1:
        raise DataError(f"rows do not agree whether higher {metric} is better")
    return 1.0 if said == {False} else -1.0


def _rank_key(method: Method, headline: str, sign: float) -> tuple[bool, float, str, str]:
    mean = method.mean(headline)
    absent = math.isnan(mean)
    source = method.rows[0].reported_source
    return absent, 0.0 if absent else round(sign * mean, 12), method.name, source


def _ranks(methods: Sequence[Method], headline: str) -> dict[str, float]:
    """Rank among the methods that have a value; controls frame the table and have none."""
    there = [m for m in methods if m.is_rival and m.values(headline)]
    means = [round(m.mean(headline), 12) for m in there]
    return {
        m.name: means.index(mean) + 1 + (means.count(mean) - 1) / 2
        for m, mean in zip(there, means, strict=True)
    }


def _columns(metric: str, found: Summary) -> dict[str, float]:
    return {
        metric: found.mean,
        f"{metric}.sd": found.sd,
        f"{metric}.ci95_low": found.ci95_low,
        f"{metric}.ci95_high": found.ci95_high,
    }


def _record(method: Method, metrics: Sequence[str]) -> dict[str, Any]:
    first = method.rows[0]
    good, bad = method.counts
    record: dict[str, Any] = {
        "method": method.name,
        "provenance": first.provenance,
        "family": method.family,
        "base_method": first.base_method,
        "status": method.status,
        "n_seeds": good,
        "n_failed": bad,
        "seed_scope": method.words_of("seed_scope"),
    }
    for metric in metrics:
        low, high = method.unit_interval(metric)
        record |= _columns(metric, method.summary(metric))
        record |= {f"{metric}.unit_ci95_low": low, f"{metric}.unit_ci95_high": high}
    record |= {name: method.mean_of(name) for name in _COSTS}
    record["overlap_flag"] = method.words_of("overlap_flag")
    record["overlap_fraction"] = method.mean_of("overlap_fraction")
    record["tuning_budget"] = method.mean_of("tuning_budget")
    record["run_ids"] = " ".join(method.run_ids)
    record["error"] = next((row.error for row in method.rows if row.error), "")
    record["reported_source"] = first.reported_source
    return record


def _reported_record(
    method: Method, methods: Sequence[Method], metrics: Sequence[str], headline: str
) -> dict[str, Any]:
    """A line of the reported block: its spread is the printed one, of the printed kind."""
    record = _record(method, metrics)
    first = method.rows[0]
    for row in method.rows:
        if row.metric_id not in metrics or row.value is None or row.reported_spread is None:
            continue
        name, spread = row.metric_id, row.reported_spread
        record[f"{name}.sd"] = spread if row.reported_spread_kind == "sd" else _NAN
        if row.reported_spread_kind == "ci95_half_width":
            record[f"{name}.ci95_low"] = row.value - spread
            record[f"{name}.ci95_high"] = row.value + spread
    same = next((m for m in methods if _same_cell(m, method)), None)
    record["gap"] = same.mean(headline) - method.mean(headline) if same else _NAN
    other = first.split_id and methods and first.split_id != methods[0].rows[0].split_id
    nothing = _columns("delta", Summary(0, _NAN))
    tests = ("delta.p", "delta.p_holm", "delta.p_t", "delta.p_t_holm")
    nothing |= dict.fromkeys((*tests, "rank"), _NAN)
    marks = {f"{name}.best": False for name in metrics}
    scaled = {f"{name}.scaled": _NAN for name in metrics}
    kinds = {row.reported_spread_kind for row in method.rows} - {""}
    told = [f"± is {_SPREADS[kind]}, as printed" for kind in sorted(kinds)]
    notes = [*first.remarks, *told, f"another split: {first.split_id}" if other else ""]
    note = {"note": "; ".join(filter(None, notes))}
    return record | nothing | {"delta.baseline": ""} | marks | scaled | note


def _same_cell(measured: Method, reported: Method) -> bool:
    """Whether both are the same kind of method on one split, its name written in whatever way."""

    def plain(name: str) -> str:
        return "".join(c for c in name.casefold() if c.isalnum())

    ours, theirs = measured.rows[0], reported.rows[0]
    same = (ours.method_family, ours.split_id) == (theirs.method_family, theirs.split_id)
    return same and plain(measured.name) == plain(reported.name)


def _deltas(methods: Sequence[Method], headline: str) -> dict[str, dict[str, Any]]:
    """The difference to the best baseline of each method that is none itself."""
    best = _whole_first([m for m in methods if m.family == "baseline"], headline)
    tests: dict[str, dict[str, float]] = {"delta.p": {}, "delta.p_t": {}}
    found: dict[str, dict[str, Any]] = {}
    for method in methods:
        compared = best is not None and method.family not in _NO_DELTA
        delta = difference(method, best, headline) if compared and best else Summary(0, _NAN)
        steps = seed_differences(method, best, headline) if compared and best else []
        tests["delta.p"][method.name] = wilcoxon(steps) if len(steps) > 1 else _NAN
        tests["delta.p_t"][method.name] = paired_t(steps) if len(steps) > 1 else _NAN
        name = best.name if best is not None and delta.num else ""
        found[method.name] = _columns("delta", delta) | {"delta.baseline": name}
    for test, values in tests.items():
        adjusted = dict(zip(values, holm(list(values.values())), strict=True))
        for name, record in found.items():
            record |= {test: values[name], f"{test}_holm": adjusted[name]}
    return found


def _whole_first(methods: Sequence[Method], metric: str) -> Method | None:
    """The first with a value for as many seeds as any: what lived through a few is no measure."""
    most = max((len(m.values(metric)) for m in methods), default=0)
    return next((m for m in methods if most and len(m.values(metric)) == most), None)


def _best(methods: Sequence[Method], metric: str, sign: float) -> set[str]:
    """The best method of a metric and all that the evidence does not set apart from it.

    Over seeds: the paired t test of the differences, Holm over methods. Without a test (one seed,
    or no seed changes either) overlapping intervals over test units, else equality.
    """
    there = [m for m in methods if m.is_rival and m.values(metric)]
    if not there:
        return set()
    there.sort(key=lambda m: _rank_key(m, metric, sign))
    top = _whole_first(there, metric) or there[0]
    others = [m for m in there if m is not top]
    steps = [seed_differences(top, m, metric) for m in others]
    tests = holm([paired_t(s) if len(s) > 1 else _NAN for s in steps])
    kept = {top.name}
    for method, p in zip(others, tests, strict=True):
        if p >= _LEVEL or (math.isnan(p) and _overlap(top, method, metric)):
            kept.add(method.name)
    return kept


def _overlap(first: Method, second: Method, metric: str) -> bool:
    one, two = first.unit_interval(metric), second.unit_interval(metric)
    if any(math.isnan(end) for end in (*one, *two)):
        return abs(first.mean(metric) - second.mean(metric)) < _SAME
    return one[0] <= two[1] and two[0] <= one[1]


def _scaled(method: Method, methods: Sequence[Method], metric: str) -> float:
    """(value - floor) / (ceiling - floor); NaN without both controls."""
    low, high = floor_of(methods, metric), ceiling_of(methods, metric)
    if low is None or high is None:
        return _NAN
    width = high.mean(metric) - low.mean(metric)
    return (method.mean(metric) - low.mean(metric)) / width if abs(width) > _SAME else _NAN


def control_scaled(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """The same rows of one table with ``floor``, ``ceiling`` and ``scaled_value`` filled in.

    Floor and ceiling are the means over seeds of the negative and the positive control; rows
    whose metric lacks one of them, and reported rows, stay as they are.
    """
    given = list(rows)
    methods = grouped(row for row in given if row.provenance == "measured")
    found = []
    for row in given:
        low, high = floor_of(methods, row.metric_id), ceiling_of(methods, row.metric_id)
        if low is None or high is None or row.value is None or row.provenance != "measured":
            found.append(row)
            continue
        floor, ceiling = low.mean(row.metric_id), high.mean(row.metric_id)
        width = ceiling - floor
        scaled = (row.value - floor) / width if abs(width) > _SAME else None
        found.append(replace(row, floor=floor, ceiling=ceiling, scaled_value=scaled))
    return found
