"""Benchmarks as one self-contained HTML page: tables, pictures, what was read and what to mind."""

from __future__ import annotations

import base64
import html
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from cellray.bench.across import columns_across
from cellray.bench.cells import REPORTED, Cell, Column, board_metrics, columns_of
from cellray.bench.confusion import plot_confusion
from cellray.bench.render import NOTES, RANKS, legend, num_measured, part_of, remarks_of
from cellray.bench.rows import ResultRow
from cellray.bench.rules import SYNTHETIC
from cellray.bench.style import STYLE
from cellray.core.errors import DataError

__all__ = ["Board", "page", "plot_confusion"]

_HYPHEN = "\u2011"  # a hyphen at which no line ends
_WIDE = 1.5  # width / height above which a picture has a line of its own


@dataclass(frozen=True)
class Board:
    """One leaderboard and what belongs to it on a page.

    Attributes:
        table: from :func:`cellray.bench.table.leaderboard`.
        title: its heading.
        facts: name -> value (data set, split, digests ...).
        pictures: heading -> PNG file.
        warnings: what a reader must know first.
        metrics: ids to show; by default the headline and the usual ones.
        links: run id -> address of its page, where there is one.
    """

    table: pd.DataFrame
    title: str
    facts: Mapping[str, object] = field(default_factory=dict)
    pictures: Mapping[str, str | Path] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    metrics: Sequence[str] | None = None
    links: Mapping[str, str] = field(default_factory=dict)


def page(
    path: str | Path,
    boards: Sequence[Board],
    *,
    title: str,
    reference: Iterable[ResultRow] = (),
    sweeps: Mapping[str, str | Path] | None = None,
) -> Path:
    """Write leaderboards and their pictures as one HTML file that needs no other file.

    Several boards of one task and headline are preceded by a summary with the median rank.

    Args:
        path: where to write.
        boards: at least one.
        title: heading of the page.
        reference: reported values of other data sets, shown folded at the end for reading only;
            left out if any board is of synthetic data.
        sweeps: heading -> PNG of the sweeps that configurations came from.

    Returns:
        ``path``.

    Raises:
        DataError: no board, a picture is missing, or a metric that a leaderboard lacks.
    """
    if not boards:
        raise DataError("no leaderboard to make a page of")
    safe = html.escape(title)
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light">',
        f"<title>{safe}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
        f"<h1>{safe}</h1>",
        _summaries(boards),
        *(_section(board, place) for place, board in enumerate(boards)),
        f"<section><h2>Sweeps</h2>{_pictures(sweeps)}</section>" if sweeps else "",
        _legend(boards),
        "" if any(b.table.attrs.get("synthetic") for b in boards) else _reference(reference),
        "</body>\n</html>\n",
    ]
    Path(path).write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return Path(path)


def _section(board: Board, place: int) -> str:
    """One leaderboard."""
    table = board.table
    columns = columns_of(table, board.metrics)
    measured = num_measured(table)
    heading = f'<h2 id="t{place}">{html.escape(board.title)}</h2>' if board.title else ""
    facts = "".join(
        f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>"
        for k, v in board.facts.items()
    )
    evidence = part_of(columns, "evidence")
    parts = [
        f"<section>\n{heading}",
        f'<p class="banner">{html.escape(SYNTHETIC)}</p>' if table.attrs.get("synthetic") else "",
        *(f'<p class="warning">{html.escape(text)}</p>' for text in board.warnings),
        _scores(table, columns, measured),
        "<h3>Evidence and cost</h3>\n" + _table(evidence, measured) if evidence else "",
        _runs(columns, measured, board.links),
        f"<dl>{facts}</dl>" if facts else "",
        _pictures(board.pictures),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _td(column: Column, cell: Cell) -> str:
    style = "num" if column.numeric else "text"
    style += f" {cell.kind}" if cell.kind == "failed" else ""
    hint = f' title="{html.escape(cell.hint)}"' if cell.hint else ""
    text = html.escape(_blank(cell.text))
    text = f"<b>{text}</b>" if cell.bold else text
    widest = max(len(other.tail.strip()) for other in column.cells)
    tail = ""
    if widest and cell.is_number:  # every number of the column ends where the others do
        inner = html.escape(cell.tail.strip())
        tail = f'<span class="spread" style="width: {widest + 1}ch">{inner}</span>'
    return f'<td class="{style}"{hint}>{text}{tail}</td>'


def _blank(text: str) -> str:
    """Padding in blanks as wide as a figure, which HTML does not swallow."""
    stripped = text.rstrip(" ")
    return stripped + "\u2007" * (len(text) - len(stripped))


def _heads(columns: Sequence[Column]) -> str:
    return "".join(
        f'<th class="{"num" if c.numeric else "text"}"'
        + (f' title="{html.escape(c.hint)}"' if c.hint else "")
        + f">{html.escape(c.title.replace('-', _HYPHEN))}</th>"
        for c in columns
    )


def _table(columns: Sequence[Column], num_lines: int, style: str = "") -> str:
    lines = [_tr([_heads(columns)])]
    lines += [_tr([_td(c, c.cells[line]) for c in columns], style) for line in range(num_lines)]
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _scores(table: pd.DataFrame, columns: Sequence[Column], measured: int) -> str:
    """The table of scores: remarks under measured methods, sources below the reported block."""
    shown = part_of(columns, "scores")
    remarks = next((c for c in columns if c.part == "remark"), None)
    lines = [_tr([_heads(shown)])]
    for line in range(len(table)):
        reported = line >= measured
        if line == measured:
            lines.append(f'<tr class="divider"><td colspan="{len(shown)}">{REPORTED}</td></tr>')
        cells = [_td(column, column.cells[line]) for column in shown]
        remark = remarks.cells[line].text if remarks and not reported else ""
        if remark:
            note = f'<div class="remark">{html.escape(remark)}</div>'
            cells[0] = cells[0].removesuffix("</td>") + note + "</td>"
        family = table["family"].iloc[line]
        style = "reported" if reported else ("control" if family == "control" else "")
        lines.append(_tr(cells, style))
    sources = [
        f"<p class='source'>† {html.escape(names.replace(' †', ''))}: {html.escape(text)}</p>"
        for names, text in remarks_of(columns)
        if "†" in names
    ]
    body = '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"
    return "\n".join([body, *sources])


def _tr(cells: Sequence[str], style: str = "") -> str:
    return f'<tr class="{style}">{"".join(cells)}</tr>' if style else f"<tr>{''.join(cells)}</tr>"


def _runs(columns: Sequence[Column], measured: int, links: Mapping[str, str]) -> str:
    """The runs behind each line, folded."""
    names = next(c for c in columns if c.part == "name").cells
    runs = next((c for c in columns if c.part == "runs"), None)
    if runs is None:
        return ""
    lines = []
    for name, cell in zip(names[:measured], runs.cells[:measured], strict=True):
        shown = [_run_link(run, links.get(run, "")) for run in cell.text.split()]
        if shown:
            lines.append(f"<dt>{html.escape(name.text)}</dt><dd>{' '.join(shown)}</dd>")
    return f"<details><summary>runs</summary><dl>{''.join(lines)}</dl></details>"


def _run_link(run: str, address: str) -> str:
    safe = f"<code>{html.escape(run)}</code>"
    return f'<a href="{html.escape(address)}">{safe}</a>' if address else safe


def _summaries(boards: Sequence[Board]) -> str:
    """For each task and headline with several boards: values, ranks and their median."""
    if len(boards) < 2:
        return ""
    links = "".join(
        f'<li><a href="#t{place}">{html.escape(board.title or "table")}</a></li>'
        for place, board in enumerate(boards)
    )
    parts = [f"<nav><ul>{links}</ul></nav>"]
    groups: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for board in boards:
        key = (str(board.table.attrs.get("task")), str(board.table.attrs.get("headline")))
        groups.setdefault(key, []).append(board.table)
    for (task, _), tables in groups.items():
        if len(tables) > 1:
            columns = columns_across(tables)
            parts.append(f"<h2>{html.escape(task)}: all data sets</h2>")
            parts.append(_table(columns, len(columns[0].cells)))
            parts.append(f'<p class="legend">{html.escape(RANKS)}</p>')
    return "\n".join(parts)


def _legend(boards: Sequence[Board]) -> str:
    metrics = dict.fromkeys(m for b in boards for m in board_metrics(b.table, b.metrics))
    lines = [*NOTES, *legend(list(metrics)).splitlines()]
    told = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f'<section class="legend"><h2>How to read this</h2><ul>{told}</ul></section>'


def _size(data: bytes, where: Path) -> tuple[int, int]:
    """Width and height in the header of a PNG file."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise DataError(f"'{where}' is no PNG picture")
    width, height = struct.unpack(">II", data[16:24])
    return int(width), int(height)


def _pictures(pictures: Mapping[str, str | Path]) -> str:
    figures = []
    for title, where in pictures.items():
        path = Path(where)
        if not path.is_file():
            raise DataError(f"no picture at '{path}' for '{title}'")
        data = path.read_bytes()
        width, height = _size(data, path)
        safe = html.escape(title)
        style = "wide" if width > _WIDE * height else "half"
        source = base64.b64encode(data).decode()
        figures.append(
            f'<figure class="{style}"><figcaption>{safe}</figcaption>'
            f'<img alt="{safe}" src="data:image/png;base64,{source}"></figure>'
        )
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def _reference(rows: Iterable[ResultRow]) -> str:
    """Reported values of other data sets, folded: for reading, beside nothing measured."""
    groups: dict[tuple[str, str, str], list[ResultRow]] = {}
    for row in rows:
        groups.setdefault((row.task, row.dataset_id, row.split_id), []).append(row)
    parts = []
    for (task, dataset, split), found in groups.items():
        frame = pd.DataFrame(
            {
                "method": f"{row.method} †",
                "metric": row.metric_id,
                "value": "" if row.value is None else f"{row.value:.3f}",
                "source": row.reported_source,
            }
            for row in found
        )
        wide = frame.pivot_table(
            index=["source", "method"],
            columns="metric",
            values="value",
            aggfunc="first",
            sort=False,
        ).fillna("-")
        for source, block in wide.groupby(level=0, sort=False):
            names = tuple(Cell(str(method)) for _, method in block.index)
            columns = [Column("method", names, numeric=False, part="name")]
            for metric in dict.fromkeys(row.metric_id for row in found):
                cells = tuple(Cell(str(text)) for text in block[metric])
                if any(cell.text != "-" for cell in cells):
                    columns.append(Column(metric, cells))
            parts.append(
                f"<h3>{html.escape(f'{task}: {dataset} ({split})')}</h3>"
                f"<p class='source'>{html.escape(str(source))}</p>"
                + _table(columns, len(names), "reported")
            )
    if not parts:
        return ""
    summary = "Reported by others on other data sets: for reading, nothing here was measured"
    return f"<details><summary>{summary}</summary>{''.join(parts)}</details>"
