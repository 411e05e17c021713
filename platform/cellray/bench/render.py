"""A leaderboard as text: aligned columns for a terminal, and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import wrap

import pandas as pd

from cellray.bench.across import columns_across
from cellray.bench.cells import (
    REPORTED,
    SHOWN,
    Cell,
    Column,
    board_metrics,
    columns_of,
    known_metric,
    title_of,
    value_text,
)
from cellray.bench.rules import SYNTHETIC

__all__ = [
    "NOTES",
    "RANKS",
    "SHOWN",
    "SPREAD",
    "board_metrics",
    "legend",
    "num_measured",
    "part_of",
    "remarks_of",
    "render_across",
    "render_markdown",
    "render_terminal",
    "shortened",
    "title_of",
    "value_text",
]

_REMARK_WIDTH = 120  # of a terminal's line
SPREAD = "mean ± standard deviation over seeds (n/a: one seed, or no seed changes the method)"
RANKS = (
    "rank: among the methods with a value on every data set; one that failed or was not run on any "
    "has none"
)
NOTES = (
    SPREAD,
    "bold: the best, or not separable from it (paired t test over seeds, Holm over methods, 5 %)",
    "Δ: paired difference to the best baseline with its 95 % interval; both p after Holm; the "
    "exact signed-rank test with n seeds has no p below 2 / 2^n",
)


def legend(metrics: Sequence[str]) -> str:
    """What the headings stand for, one line a metric."""
    known = [m for m in map(known_metric, metrics) if m is not None]
    return "\n".join(f"{title_of(m.id)} = {m.id}: {m.meaning}" for m in known)


def num_measured(board: pd.DataFrame) -> int:
    """Lines above the reported block."""
    return int((board["provenance"] != "reported").sum())


def remarks_of(columns: Iterable[Column]) -> list[tuple[str, str]]:
    """(methods, what a reader must know of them), each remark once."""
    found: dict[str, list[str]] = {}
    by_part = {column.part: column for column in columns if column.part in ("name", "remark")}
    if "remark" not in by_part:
        return []
    for name, remark in zip(by_part["name"].cells, by_part["remark"].cells, strict=True):
        if remark.text:
            found.setdefault(remark.text, []).append(name.text)
    return [(", ".join(names), text) for text, names in found.items()]


def part_of(columns: Sequence[Column], part: str) -> list[Column]:
    """The name and the columns of one part; empty if it has none."""
    chosen = [column for column in columns if column.part in ("name", part)]
    return chosen if len(chosen) > 1 else []


def render_terminal(board: pd.DataFrame, *, metrics: Sequence[str] | None = None) -> str:
    """Aligned text: scores as mean ± standard deviation over seeds; then evidence and costs.

    Args:
        board: from :func:`cellray.bench.table.leaderboard`.
        metrics: ids to show; by default the headline and accuracy, macro P, R and F1.

    Raises:
        DataError: a metric that the leaderboard lacks.
    """
    columns = columns_of(board, metrics)
    measured = num_measured(board)
    blocks = [_text_block(part_of(columns, "scores"), len(board), measured)]
    evidence = part_of(columns, "evidence")
    if evidence:
        blocks.append(_text_block(evidence, measured, measured))
    lines = [f"!! {SYNTHETIC} !!"] if board.attrs.get("synthetic") else []
    width = max(len(line) for block in blocks for line in block)
    for block in blocks:
        lines += [block[0], "─" * width, *block[1:], "─" * width]
    lines.append(SPREAD)
    for names, text in remarks_of(columns):
        lines += wrap(f"{names}: {text}", _REMARK_WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


def render_across(boards: Sequence[pd.DataFrame]) -> str:
    """Aligned text of several leaderboards: values by data set and the median rank.

    Raises:
        DataError: boards of several tasks or headlines, or two of one data set and split.
    """
    columns = columns_across(boards)
    block = _text_block(columns, len(columns[0].cells), len(columns[0].cells))
    rule = "─" * max(len(line) for line in block)
    return "\n".join([block[0], rule, *block[1:], rule, RANKS])


def _text_block(columns: Sequence[Column], num_lines: int, measured: int) -> list[str]:
    """Heading and lines, aligned, with the divider above the reported ones."""
    table = [[column.title for column in columns]]
    table += [[column.cells[line].whole for column in columns] for line in range(num_lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    lines = []
    for line in table:
        padded = [
            cell.rjust(width) if column.numeric else cell.ljust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    if measured < num_lines:
        lines.insert(1 + measured, f"-- {REPORTED} --")
    return lines


def shortened(text: str, width: int) -> str:
    """``text``, cut to ``width`` characters with an ellipsis if it is longer."""
    return text if len(text) <= width else text[: width - 1] + "…"


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_text(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _markdown_cell(cell: Cell, *, reported: bool) -> str:
    text = _markdown_text(cell.whole)
    if reported and text:
        return f"*{text}*"
    return f"**{_markdown_text(cell.text)}**{cell.tail.rstrip()}" if cell.bold else text


def _markdown_block(columns: Sequence[Column], num_lines: int, measured: int) -> list[str]:
    lines = [_markdown_line([_markdown_text(column.title) for column in columns])]
    lines.append(_markdown_line(["---:" if column.numeric else "---" for column in columns]))
    for line in range(num_lines):
        if line == measured:
            lines.append(_markdown_line([f"*{REPORTED}*", *[""] * (len(columns) - 1)]))
        cells = [_markdown_cell(c.cells[line], reported=line >= measured) for c in columns]
        lines.append(_markdown_line(cells))
    return lines


def render_markdown(board: pd.DataFrame, *, metrics: Sequence[str] | None = None) -> str:
    """The same as Markdown tables, with remarks and what each heading means below them.

    Bold is what is not separable from the best of its column.

    Args:
        board: from :func:`cellray.bench.table.leaderboard`.
        metrics: ids to show.

    Raises:
        DataError: a metric that the leaderboard lacks.
    """
    columns = columns_of(board, metrics)
    measured = num_measured(board)
    lines = [f"> **{SYNTHETIC}**", ""] if board.attrs.get("synthetic") else []
    lines += _markdown_block(part_of(columns, "scores"), len(board), measured)
    evidence = part_of(columns, "evidence")
    if evidence:
        lines += ["", *_markdown_block(evidence, measured, measured)]
    told = [f"- {names}: {_markdown_text(text)}" for names, text in remarks_of(columns)]
    meaning = [f"- {line}" for line in legend(board_metrics(board, metrics)).splitlines()]
    notes = [f"- {line}" for line in NOTES]
    return "\n".join([*lines, "", *told, *meaning, *notes]).rstrip() + "\n"
