"""What stands in each cell of a printed leaderboard: the one source of terminal, Markdown, HTML.

Values are rounded to what their interval over seeds supports; a failed run is a word, never a
number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd

from cellray.bench.reported import reported
from cellray.core.errors import DataError, did_you_mean
from cellray.metrics.base import Metric, all_metrics

__all__ = [
    "REPORTED",
    "Cell",
    "Column",
    "board_metrics",
    "columns_of",
    "decimals_for",
    "headline_of",
    "known_metric",
    "title_of",
    "value_text",
]

# What a table shows unless asked: of a task's metrics those that sum it up.
SHOWN = (
    "accuracy.v1",
    "macro_precision.union.v1",
    "macro_recall.union.v1",
    "macro_f1.union.v1",
    "macro_f1.test.v1",
    "unknown_auroc.v1",
    "macro_f1_test.batch_mean.v1",
    "macro_f1_test.batch_min.v1",
    "total_60_40.bio5_batch5.v1",
    "total_60_40.bio5_batch4.v1",
    "bio_mean.nmi_ari_asw_isolated_clisi.v1",
    "batch_mean.bras_ilisi_kbet_connectivity_pcr.v1",
    "batch_mean.bras_ilisi_kbet_connectivity.v1",
    "overall.scgpt_leiden.v1",
    "avg_bio.scgpt_leiden.v1",
    "avg_batch.scgpt.v1",
    "macro_f1.linear_probe.v1",
    "macro_f1.knn_probe.v1",
    "overall.scgpt_louvain.paper",
    "avg_bio.scgpt_louvain.paper",
    "avg_batch.scgpt.paper",
)
Part = Literal["name", "scores", "evidence", "remark", "runs"]
REPORTED = "reported by others, not measured here"
_PLAIN = 3  # decimals where no interval says otherwise
_MOST = 4
_KINDS = {
    "foundation_ft": "fine-tuned",
    "foundation_zs": "frozen",
    "from_scratch": "from scratch",
    "random_init": "random weights",
}


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what stands there, padded so that decimal points of a column align.
        tail: a lighter part behind it: the spread.
        kind: "", ``failed``, ``note``.
        bold: the best of a column, or not separable from it.
        hint: more of it, shown on demand where the medium can.
    """

    text: str
    tail: str = ""
    kind: str = ""
    bold: bool = False
    hint: str = ""

    @property
    def whole(self) -> str:
        """Text and tail."""
        return self.text + self.tail

    @property
    def is_number(self) -> bool:
        """Whether it is one, as against a word or a dash."""
        return any(c.isdigit() for c in self.text) and self.text[:1] in "+-<0123456789"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: its heading.
        cells: one a line of the leaderboard.
        numeric: aligned to the right.
        part: ``name``, ``scores``, ``evidence`` (with costs; measured methods only), ``remark``
            or ``runs``.
        hint: what the heading stands for.
    """

    title: str
    cells: tuple[Cell, ...]
    numeric: bool = True
    part: Part = "scores"
    hint: str = ""


def known_metric(metric: str) -> Metric | None:
    """What an id means: measured or, failing that, a metric that only papers have."""
    return all_metrics().get(metric) or reported().metrics.get(metric)


def title_of(metric: str) -> str:
    """The heading of a metric, with an arrow where lower is better; its id if it has no title."""
    found = known_metric(metric)
    if found is None:
        return metric
    return f"{found.title} ↓" if found.higher_is_better is False else found.title


def board_metrics(board: pd.DataFrame, metrics: Sequence[str] | None = None) -> list[str]:
    """Which metrics to print: the ones asked for, else the usual ones, else all there are.

    Raises:
        DataError: the leaderboard has no such metric.
    """
    there = [c.removesuffix(".sd") for c in board.columns if c.endswith(".sd") and c != "delta.sd"]
    for name in metrics or ():
        if name not in there:
            raise DataError(
                f"the leaderboard has no metric '{name}'.{did_you_mean(name, there)} It has: "
                f"{', '.join(there)}"
            )
    chosen = list(metrics or [name for name in SHOWN if name in there] or there)
    headline = headline_of(board)
    if metrics is None and headline in there:
        chosen = [headline, *(name for name in chosen if name != headline)]
    return chosen


def headline_of(board: pd.DataFrame) -> str:
    """The metric the leaderboard is sorted by."""
    return str(board.attrs.get("headline", ""))


def decimals_for(half_width: float) -> int:
    """Decimals that an interval supports: its half-width to one digit, two if the first is 1 or 2.

    Args:
        half_width: of the interval; NaN or 0 says nothing and gives three decimals.
    """
    if math.isnan(half_width) or half_width <= 0:
        return _PLAIN
    power = math.floor(math.log10(half_width))
    leading = round(half_width / 10.0**power, 6)
    return max(0, min(_MOST, -power + (1 if leading < 3 else 0)))


def value_text(row: pd.Series, metric: str) -> str:
    """``0.87 ± 0.01``, ``0.965 ± n/a``, ``failed`` or, for a reported row, ``0.703``."""
    return _value(row, metric).whole.strip()


def _number(row: pd.Series, name: str) -> float:
    value = row.get(name, math.nan)
    return math.nan if value is None else float(value)


def _value(row: pd.Series, metric: str) -> Cell:
    mean, spread = _number(row, metric), _number(row, f"{metric}.sd")
    low, high = _number(row, f"{metric}.ci95_low"), _number(row, f"{metric}.ci95_high")
    if math.isnan(mean):
        if row["provenance"] == "reported" or not row["n_failed"] or row["n_seeds"]:
            return Cell("-")
        return Cell("skipped" if row["status"] == "skipped" else "failed", kind="failed")
    known = known_metric(metric)
    if known is not None and known.higher_is_better is None and mean == round(mean):
        return Cell(f"{mean:,.0f}")
    half = (high - low) / 2
    places = decimals_for(half)
    hint = "" if math.isnan(half) else f"95 % interval {low:.4f} to {high:.4f}"
    bold = bool(row.get(f"{metric}.best", False))
    if row["provenance"] == "reported":
        tail = ""
        if not math.isnan(spread):
            tail, hint = f" ± {spread:.{_PLAIN}f}", "standard deviation, as printed"
        elif not math.isnan(half):
            tail = f" ± {half:.{_PLAIN if half >= 0.001 else _MOST}f}"
            hint = "half-width of a 95 % interval, as printed"
        return Cell(f"{mean:.{_PLAIN}f}", tail, hint=hint)
    if math.isnan(spread):
        return Cell(f"{mean:.{_PLAIN}f}", " ± n/a", bold=bold)
    return Cell(f"{mean:.{places}f}", f" ± {spread:.{places}f}", bold=bold, hint=hint)


def _interval(low: float, high: float) -> str:
    if math.isnan(low) or math.isnan(high):
        return ""
    places = decimals_for((high - low) / 2)
    return f"[{low:.{places}f}, {high:.{places}f}]"


def _aligned(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Pad numbers with blanks so that decimal points, and spreads, stand in line."""

    def places(cell: Cell) -> int:
        whole, point, part = cell.text.partition(".")
        plain = whole.lstrip("+-<").replace(",", "").isdigit()
        return len(part) + 1 if point and plain else 0

    most = max((places(cell) for cell in cells), default=0)
    width = max((len(cell.tail) for cell in cells), default=0)
    return tuple(
        replace(cell, text=cell.text + " " * (most - places(cell)), tail=cell.tail.ljust(width))
        if cell.is_number
        else cell
        for cell in cells
    )


def _name(row: pd.Series) -> Cell:
    if row["provenance"] == "reported":
        return Cell(f"{row['method']} †")
    return Cell(f"{row['method']} (derived)" if row["provenance"] == "derived" else row["method"])


def _seeds(row: pd.Series) -> Cell:
    if row["provenance"] == "reported":
        return Cell("-")
    good, bad = int(row["n_seeds"]), int(row["n_failed"])
    return Cell(f"{good} of {good + bad}" if bad else str(good), kind="failed" if bad else "")


def _range(metric: str, which: str) -> Callable[[pd.Series], Cell]:
    def cell(row: pd.Series) -> Cell:
        low, high = _number(row, f"{metric}.{which}_low"), _number(row, f"{metric}.{which}_high")
        return Cell(_interval(low, high))

    return cell


def _delta(row: pd.Series) -> Cell:
    mean = _number(row, "delta")
    if math.isnan(mean):
        return Cell("")
    low, high = _number(row, "delta.ci95_low"), _number(row, "delta.ci95_high")
    places = decimals_for((high - low) / 2)
    interval = _interval(low, high)
    return Cell(f"{mean:+.{places}f}", f" {interval}" if interval else "")


def _p(name: str) -> Callable[[pd.Series], Cell]:
    def cell(row: pd.Series) -> Cell:
        p = _number(row, f"{name}_holm")
        if math.isnan(p):
            return Cell("")
        return Cell("<0.001" if p < 0.001 else f"{p:.3f}", hint=f"unadjusted {row[name]:.4g}")

    return cell


def _plain(name: str, form: Callable[[float], str]) -> Callable[[pd.Series], Cell]:
    def cell(row: pd.Series) -> Cell:
        value = _number(row, name)
        return Cell("" if math.isnan(value) else form(value))

    return cell


def _amount(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(places, 5)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _overlap(row: pd.Series) -> Cell:
    if row["provenance"] == "reported":
        return Cell("")
    share = _number(row, "overlap_fraction")
    flag = str(row.get("overlap_flag", ""))
    return Cell(flag if math.isnan(share) else f"{flag} ({100 * share:.1f} %)")


def _remark(row: pd.Series) -> Cell:
    parts = []
    if row["n_failed"]:
        parts.append(f"{row['status']}: {row['error']}" if row["error"] else str(row["status"]))
    parts += [str(row[name]) for name in ("note", "reported_source") if row.get(name)]
    return Cell("; ".join(" ".join(part.split()) for part in parts), kind="note")


def _runs(row: pd.Series) -> Cell:
    return Cell(str(row.get("run_ids", "")), kind="runs")


def columns_of(board: pd.DataFrame, metrics: Sequence[str] | None = None) -> list[Column]:
    """The columns to print; those in which every cell is empty are left out.

    Args:
        board: from :func:`cellray.bench.table.leaderboard`.
        metrics: ids to show; by default the headline and the usual ones.

    Raises:
        DataError: a metric that the leaderboard lacks.
    """
    shown = board_metrics(board, metrics)
    head = headline_of(board) if headline_of(board) in shown else shown[0]
    lines = [row for _, row in board.iterrows()]
    found = []
    for title, part, make, hint in [*_scores(shown, head), *_evidence(lines, head), *_REST]:
        cells = [make(row) for row in lines]
        numeric = title not in _WORDS
        aligned = _aligned(cells) if numeric else tuple(cells)
        if any(cell.whole.strip() for cell in cells):
            found.append(Column(title, aligned, numeric, part, hint))
    return found


_Make = Callable[[pd.Series], Cell]
_Plan = tuple[str, Part, _Make, str]
_WORDS = ("method", "kind", "overlap", "remark", "runs")
_REST: tuple[_Plan, ...] = (("remark", "remark", _remark, ""), ("runs", "runs", _runs, ""))


def _scores(shown: Sequence[str], head: str) -> list[_Plan]:
    def value_of(metric: str) -> _Make:
        return lambda row: _value(row, metric)

    def kind(row: pd.Series) -> Cell:
        return Cell(_KINDS.get(row["family"], row["family"]))

    plan: list[_Plan] = [
        ("method", "name", _name, ""),
        ("kind", "scores", kind, ""),
        ("seeds", "scores", _seeds, "runs that worked"),
    ]
    gap = _plain("gap", lambda v: f"{v:+.3f}")
    for metric in shown:
        known = known_metric(metric)
        meaning = f"{metric}: {known.meaning}" if known else metric
        plan.append((title_of(metric), "scores", value_of(metric), meaning))
        if metric == head:
            plan.append(("reproduction gap", "scores", gap, "measured minus reported"))
    return plan


def _evidence(lines: Sequence[pd.Series], head: str) -> list[_Plan]:
    best = next((r["delta.baseline"] for r in lines if r.get("delta.baseline")), "")
    over_units = "bootstrap over test units, which is not the spread over seeds"
    scaled = _plain(f"{head}.scaled", lambda v: f"{v:.3f}")
    trials = _plain("tuning_budget", lambda v: f"{v:.0f}")
    plan: list[tuple[str, _Make, str]] = [
        ("95 % over seeds", _range(head, "ci95"), "t interval"),
        ("95 % over test units", _range(head, "unit_ci95"), over_units),
        ("control-scaled", scaled, "(value - negative control) / (positive - negative)"),
        (f"Δ to {best}", _delta, "paired difference to the best baseline, 95 % interval"),
        ("p (t)", _p("delta.p_t"), "paired t test over seeds, Holm over methods"),
        ("p (Wilcoxon)", _p("delta.p"), "exact signed-rank test over seeds, Holm over methods"),
        ("GPU-h", _plain("gpu_hours", _amount), "GPU-hours per run"),
        ("CPU-h", _plain("cpu_hours", _amount), "core-hours per run"),
        (
            "cells/s",
            _plain("cells_per_s", _amount),
            "cells trained on (frozen: embedded) a second",
        ),
        ("overlap", _overlap, "of test cells with the pretraining corpus"),
        ("trials", trials, "configurations tried to choose this one"),
    ]
    return [(title, "evidence", make, hint) for title, make, hint in plan]
