"""A leaderboard as text: aligned columns for a terminal, and Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from cellray.core.errors import DataError, did_you_mean
from cellray.metrics.classification import METRICS

__all__ = [
    "SHOWN",
    "board_metrics",
    "legend",
    "render_markdown",
    "render_terminal",
    "shortened",
    "title_of",
    "value_text",
]

SHOWN = (
    "accuracy.v1",
    "macro_precision.union.v1",
    "macro_recall.union.v1",
    "macro_f1.union.v1",
    "macro_f1.test.v1",
)
_REMARK_WIDTH = 60  # of a terminal's line; Markdown and the page have all of it
_REPORTED = "reported by others, not measured here"


def title_of(metric: str) -> str:
    """The heading of a metric; its id if it has no title."""
    return METRICS[metric].title if metric in METRICS else metric


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
    return list(metrics or [name for name in SHOWN if name in there] or there)


def value_text(row: pd.Series, metric: str) -> str:
    """``0.873 ± 0.012``, ``0.965 ± n/a``, ``failed`` or, for a reported row, ``0.703``."""
    mean, spread = float(row[metric]), float(row[f"{metric}.sd"])
    reported = row["provenance"] == "reported"
    if math.isnan(mean):
        if reported or not row["n_failed"] or row["n_seeds"]:
            return "-"
        return "skipped" if row["status"] == "skipped" else "failed"
    if math.isnan(spread):
        return f"{mean:.3f}" if reported else f"{mean:.3f} ± n/a  "
    return f"{mean:.3f} ± {spread:.3f}"


def _remark(row: pd.Series) -> str:
    parts = []
    if row["n_failed"]:
        parts.append(f"{row['status']}: {row['error']}" if row["error"] else str(row["status"]))
    if isinstance(row.get("note"), str) and row["note"]:
        parts.append(row["note"])
    if row["reported_source"]:
        parts.append(str(row["reported_source"]))
    return "; ".join(" ".join(part.split()) for part in parts)


@dataclass(frozen=True)
class _Cells:
    """A leaderboard as strings; ``split`` is the first reported line."""

    heading: list[str]
    lines: list[list[str]]
    split: int


def _cells(board: pd.DataFrame, metrics: Sequence[str]) -> _Cells:
    lines = []
    for _, row in board.iterrows():
        reported = row["provenance"] == "reported"
        seeds = "-" if reported else str(row["n_seeds"])
        name = f"{row['method']} †" if reported else str(row["method"])
        lines.append([name, seeds, *(value_text(row, m) for m in metrics), _remark(row)])
    heading = ["method", "seeds", *(title_of(m) for m in metrics), "remark"]
    if not any(line[-1] for line in lines):
        heading, lines = heading[:-1], [line[:-1] for line in lines]
    return _Cells(heading, lines, int((board["provenance"] != "reported").sum()))


def legend(metrics: Sequence[str]) -> str:
    """What the headings stand for, one line a metric."""
    known = [METRICS[m] for m in metrics if m in METRICS]
    return "\n".join(f"{m.title} = {m.id}: {m.meaning}" for m in known)


def render_terminal(board: pd.DataFrame, *, metrics: Sequence[str] | None = None) -> str:
    """Aligned text: mean ± standard deviation over seeds.

    Args:
        board: from :func:`cellray.bench.table.leaderboard`.
        metrics: ids to show; by default accuracy, macro P, R and F1.

    Raises:
        DataError: a metric that the leaderboard lacks.
    """
    shown = board_metrics(board, metrics)
    cells = _cells(board, shown)
    if cells.heading[-1] == "remark":
        for line in cells.lines:
            line[-1] = shortened(line[-1], _REMARK_WIDTH)
    table = [cells.heading, *cells.lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(cells.heading))]
    num_right = 1 + len(shown)  # seeds and values are aligned right, names and remarks left

    def text(line: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if 1 <= i <= num_right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    lines = [text(line) for line in cells.lines]
    if cells.split < len(lines):
        lines.insert(cells.split, f"-- {_REPORTED} --")
    rule = "─" * max(len(text(cells.heading)), *(len(line) for line in lines))
    note = "mean ± standard deviation over seeds (n/a: one seed, or no seed changes the method)"
    return "\n".join([text(cells.heading), rule, *lines, rule, note])


def shortened(text: str, width: int) -> str:
    """``text``, cut to ``width`` characters with an ellipsis if it is longer."""
    return text if len(text) <= width else text[: width - 1] + "…"


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.strip().replace("|", "\\|") for cell in cells) + " |"


def render_markdown(board: pd.DataFrame, *, metrics: Sequence[str] | None = None) -> str:
    """The same as a Markdown table, with what each heading means below it.

    Args:
        board: from :func:`cellray.bench.table.leaderboard`.
        metrics: ids to show.

    Raises:
        DataError: a metric that the leaderboard lacks.
    """
    shown = board_metrics(board, metrics)
    cells = _cells(board, shown)
    align = ["---", *["---:"] * (1 + len(shown)), *["---"] * (len(cells.heading) - 2 - len(shown))]
    lines = [_markdown_line(cells.heading), _markdown_line(align)]
    lines += [_markdown_line(line) for line in cells.lines[: cells.split]]
    if cells.split < len(cells.lines):
        blank = [""] * (len(cells.heading) - 1)
        lines.append(_markdown_line([f"*{_REPORTED}*", *blank]))
        for line in cells.lines[cells.split :]:
            lines.append(_markdown_line([f"*{c}*" if c.strip() else "" for c in line]))
    meaning = [f"- {line}" for line in legend(shown).splitlines()]
    return "\n".join([*lines, "", *meaning]).rstrip() + "\n"
