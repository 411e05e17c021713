"""Rules that a table must obey to be shown at all, and flags a reader must see beside a method."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from cellray.bench.methods import Method, seed_differences
from cellray.bench.rows import ResultRow
from cellray.bench.stats import paired_t
from cellray.core.errors import DataError

__all__ = [
    "FLOOR",
    "SYNTHETIC",
    "ceiling_of",
    "check_comparable",
    "check_compulsory",
    "check_controls",
    "check_own_controls",
    "check_reported",
    "flags",
    "floor_of",
    "is_negative",
    "is_positive",
]

FLOOR = "majority"  # predicts without looking at a cell
SYNTHETIC = "synthetic data: it shows that the code works, and nothing about biology"
_LEVEL = 0.05
_SAME = 1e-9
_SHARED = (
    *("task", "subtask", "dataset_id", "dataset_sha256", "split_id", "split_sha256"),
    "n_classes_train",
)

# family -> the families of the rows that must stand beside each of its methods
_OWN_CONTROLS = {
    "foundation_ft": ("from_scratch", "random_init"),
    "foundation_zs": ("random_init",),
}


def is_negative(method: Method) -> bool:
    """A control that must not be passed from below: ``....negative``, or the majority."""
    named = re.search(r"(^|[._-])negative$", method.name) is not None
    return method.name == FLOOR or (method.family == "control" and named)


def is_positive(method: Method) -> bool:
    """A control that knows the answer: ``....positive``."""
    named = re.search(r"(^|[._-])positive$", method.name) is not None
    return method.family == "control" and named


def floor_of(methods: Iterable[Method], metric: str) -> Method | None:
    """The negative control of a metric: a control if there is one, else the majority."""
    found = [m for m in methods if is_negative(m) and m.values(metric)]
    found.sort(key=lambda m: (m.family != "control", m.name))
    return found[0] if found else None


def ceiling_of(methods: Iterable[Method], metric: str) -> Method | None:
    """The positive control of a metric."""
    found = [m for m in methods if is_positive(m) and m.values(metric)]
    found.sort(key=lambda m: m.name)
    return found[0] if found else None


def check_comparable(rows: Sequence[ResultRow]) -> None:
    """Measured rows of one table must share task, data and split, each run given once.

    Raises:
        DataError: they do not, or there is no row.
    """
    if not rows:
        raise DataError("no measured result to make a table of")
    for name in _SHARED:
        found = sorted({str(getattr(row, name)) for row in rows})
        if len(found) > 1:
            raise DataError(
                f"rows of one table differ in {name}: {', '.join(found[:4])}; make one table each"
            )
    _check_once(rows)
    for method in {row.method for row in rows}:
        families = sorted({row.method_family for row in rows if row.method == method})
        if len(families) > 1:
            raise DataError(
                f"rows of method '{method}' are of several families: {', '.join(families)}; give "
                "each a name of its own"
            )


def _check_once(rows: Sequence[ResultRow]) -> None:
    seen: set[tuple[str, int | None, str]] = set()
    good = {(row.method, row.seed) for row in rows if row.status == "ok"}
    for row in rows:
        key = (row.method, row.seed, row.metric_id)
        if key in seen:
            raise DataError(
                f"two rows for method '{row.method}', seed {row.seed}, {row.metric_id or 'failed'};"
                " give each run once"
            )
        seen.add(key)
        if row.status != "ok" and (row.method, row.seed) in good:
            raise DataError(
                f"method '{row.method}', seed {row.seed}, is {row.status} and has values too; give "
                "each run once"
            )


def _attempted(rows: Iterable[ResultRow]) -> list[ResultRow]:
    return [row for row in rows if row.status != "skipped"]


def check_compulsory(rows: Iterable[ResultRow], compulsory: Sequence[str]) -> None:
    """Compulsory baselines must have been run; one whose every run failed is shown as failed.

    Raises:
        DataError: one was not run.
    """
    there = {row.method for row in _attempted(rows)}
    missing = [name for name in compulsory if name not in there]
    if missing:
        raise DataError(
            f"the table lacks compulsory baselines: {', '.join(missing)}; run them on the same "
            "split (benchmark key baselines) before showing any method"
        )


def check_own_controls(rows: Sequence[ResultRow]) -> None:
    """A pretrained method stands beside its own architecture without pretraining.

    Raises:
        DataError: a foundation method lacks the row from scratch or the one with random weights.
    """
    there = {(row.method_family, base) for row in _attempted(rows) for base in row.bases}
    for row in rows:
        wanted = _OWN_CONTROLS.get(row.method_family, ())
        missing = [family for family in wanted if (family, row.method) not in there]
        if missing:
            raise DataError(
                f"the table lacks the {' and the '.join(missing)} row of '{row.method}' "
                f"(base_method = '{row.method}'); without it nobody can say what pretraining did"
            )


def check_controls(methods: Sequence[Method], headline: str, sign: float) -> None:
    """The positive control stands above every method, and above the negative control.

    Args:
        methods: measured.
        headline: the metric.
        sign: -1 where higher is better, 1 where lower is.

    Raises:
        DataError: it does not: then the score or the split is wrong, not the method good.
    """
    top = ceiling_of(methods, headline)
    if top is None:
        return
    best = sign * top.mean(headline)
    for method in methods:
        mean = sign * method.mean(headline)
        if method is top or is_positive(method) or math.isnan(mean) or mean >= best - _SAME:
            continue
        kind = "the negative control" if is_negative(method) else "method"
        raise DataError(
            f"controls are out of order: {kind} '{method.name}' has {headline} = "
            f"{method.mean(headline):.4f}, beyond the positive control '{top.name}' with "
            f"{top.mean(headline):.4f}; the score, the split or the control is wrong, and the "
            "table is not shown"
        )


def check_reported(measured: Sequence[ResultRow], reported: Sequence[ResultRow]) -> None:
    """Reported values stand only beside measured ones of the same real data.

    Raises:
        DataError: the measured data are synthetic, or other data.
    """
    if not measured or not reported:
        return
    first = measured[0]
    if first.is_synthetic:
        raise DataError(
            f"'{first.dataset_id}' is synthetic data: reported values of real data are not shown "
            "beside it"
        )
    for row in reported:
        if (row.task, row.dataset_id) != (first.task, first.dataset_id):
            raise DataError(
                f"reported values of '{row.dataset_id}' ({row.task}) beside measured ones of "
                f"'{first.dataset_id}' ({first.task}); leave them out"
            )


def _chance_flag(method: Method, floor: Method | None, headline: str, sign: float) -> str:
    """Says so where a method is no better than looking at nothing."""
    if floor is None or method is floor or is_negative(method):
        return ""
    ours, theirs = sign * method.mean(headline), sign * floor.mean(headline)
    if math.isnan(ours):
        return ""
    if ours >= theirs:
        return f"not above {floor.name}"
    found = seed_differences(method, floor, headline)
    if found and paired_t(found) >= _LEVEL:
        return f"at the level of chance: not separable from {floor.name}"
    return ""


def _budget_flag(method: Method, baselines: Sequence[Method]) -> str:
    """Says so where a method was tuned with another number of trials than the best tuned baseline.

    Baselines without anything to tune have a budget of one, which is no one's disadvantage.
    """
    ours = method.mean_of("tuning_budget")
    budgets = {m.mean_of("tuning_budget"): m.name for m in reversed(baselines)}
    known = [budget for budget in budgets if not math.isnan(budget)]
    if math.isnan(ours) or method.family in ("baseline", "control") or not known:
        return ""
    most = max(known)
    if ours == most:
        return ""
    trials = f"{ours:.0f} trial{'s' * (ours != 1)}"
    return f"unequal tuning budget: {trials} ({budgets[most]} {most:.0f})"


def flags(
    method: Method,
    methods: Sequence[Method],
    headline: str,
    sign: float,
) -> list[str]:
    """What a reader must see beside a method: chance, unequal effort, remarks of its runs."""
    floors = [m for m in methods if is_negative(m) and m.values(headline)]
    baselines = [m for m in methods if m.family == "baseline"]
    found = [] if is_positive(method) else [_chance_flag(method, f, headline, sign) for f in floors]
    found.append(_budget_flag(method, baselines))
    told: dict[str, set[int | None]] = {}
    for row in method.rows:
        for remark in row.remarks:
            told.setdefault(remark, set()).add(row.seed)
    seeds = len({row.seed for row in method.rows})
    for remark, by in told.items():
        found.append(remark if len(by) == seeds else f"{remark} ({len(by)} of {seeds} seeds)")
    return [flag for flag in found if flag]
