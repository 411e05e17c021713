"""A benchmark as one self-contained HTML page, and the confusion matrix as a picture."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cellray.bench.render import board_metrics, legend, title_of, value_text
from cellray.core.errors import DataError
from cellray.metrics.classification import confusion_matrix

__all__ = ["plot_confusion", "write_report"]

Labels = Sequence[str] | npt.NDArray[np.generic]

_DPI = 150
_MOST_CLASSES = 60

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 2.5rem auto; padding: 0 1rem;
       max-width: 1200px; }
h1 { font-size: 1.5rem; margin-bottom: 0.3rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: right; border-bottom: 2px solid #444; padding: 0.3rem 0.8rem; }
td { text-align: right; border-bottom: 1px solid #e3e3e3; padding: 0.3rem 0.8rem; }
th:first-child, td:first-child, td.remark, th.remark { text-align: left; }
.spread { color: #777; } tr.reported td { color: #777; font-style: italic; }
tr.divider td { color: #777; text-align: left; padding-top: 1rem; }
.failed { color: #b00020; } .warning { border-left: 4px solid #e69f00; padding-left: 0.8rem; }
dl { display: grid; grid-template-columns: max-content auto; gap: 0.1rem 1.2rem; color: #444; }
dd { margin: 0; word-break: break-all; } img { max-width: 100%; } .legend { color: #555; }
"""


def plot_confusion(truth: Labels, predicted: Labels, *, path: str | Path, title: str = "") -> Path:
    """Draw which class is taken for which: colour is the share of the true class, text the cells.

    Rows are true classes (largest first) with their number of cells; a class that only occurs in
    predictions has an empty row, drawn last.

    Args:
        truth: N labels.
        predicted: N labels.
        path: PNG to write; its folder must exist.
        title: heading.

    Returns:
        ``path``.

    Raises:
        DataError: lengths differ, a label is missing, nothing to draw, or more than 60 classes.
    """
    matrix, names = confusion_matrix(truth, predicted)
    if len(names) > _MOST_CLASSES:
        raise DataError(
            f"a confusion matrix of {len(names)} classes cannot be read; draw at most "
            f"{_MOST_CLASSES}, e.g. of one lineage"
        )
    order = np.argsort(-matrix.sum(axis=1), kind="stable")
    matrix, shown = matrix[np.ix_(order, order)], [names[i] for i in order]
    support = matrix.sum(axis=1)
    share = matrix / np.maximum(support, 1)[:, None]
    side = max(3.2, 0.42 * len(shown))
    figure = Figure(figsize=(side + 2.9, side + 1.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0)
    _label_axes(axes, shown, support)
    for row, column in zip(*np.nonzero(matrix), strict=True):
        dark = share[row, column] > 0.55
        axes.text(
            column,
            row,
            f"{matrix[row, column]}",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if dark else "#1A1A1A",
        )
    bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02)
    bar.set_label("share of the true class", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    correct = int(np.trace(matrix))
    heading = f"{title}  ·  " if title else ""
    axes.set_title(
        f"{heading}{correct:,} of {support.sum():,} cells correct", fontsize=10, loc="left"
    )
    figure.savefig(path, dpi=_DPI, facecolor="white")
    return Path(path)


def _label_axes(axes: Any, names: Sequence[str], support: npt.NDArray[np.int64]) -> None:
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    rows = [f"{name} ({num:,})" for name, num in zip(names, support, strict=True)]
    axes.set_yticks(ticks, rows, fontsize=8)
    axes.set_xlabel("predicted", fontsize=9)
    axes.set_ylabel("true (cells)", fontsize=9)
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(len(names) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="#EFEFEF", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    for side in axes.spines.values():
        side.set_color("#D0D0D0")


def _cell(row: pd.Series, metric: str) -> str:
    mean, plus, spread = value_text(row, metric).strip().partition(" ± ")
    if math.isnan(float(row[metric])):
        return f'<td class="failed">{html.escape(mean)}</td>' if mean != "-" else "<td>-</td>"
    low, high = float(row[f"{metric}.ci95_low"]), float(row[f"{metric}.ci95_high"])
    hint = "" if math.isnan(low) else f' title="95 % interval {low:.3f} to {high:.3f}"'
    tail = f' <span class="spread">± {html.escape(spread)}</span>' if plus else ""
    return f"<td{hint}>{html.escape(mean)}{tail}</td>"


def _table(board: pd.DataFrame, metrics: Sequence[str]) -> str:
    heads = "".join(f"<th>{html.escape(title_of(m))}</th>" for m in metrics)
    lines = [f'<tr><th>method</th><th>seeds</th>{heads}<th class="remark">remark</th></tr>']
    divided = False
    for _, row in board.iterrows():
        reported = row["provenance"] == "reported"
        if reported and not divided:
            divided = True
            width = len(metrics) + 3
            lines.append(
                f'<tr class="divider"><td colspan="{width}">reported by others, not measured '
                "here</td></tr>"
            )
        name = f"{row['method']} †" if reported else str(row["method"])
        note = row["note"] if isinstance(row.get("note"), str) else ""
        remarks = (row["error"], row["reported_source"], note)
        remark = "; ".join(html.escape(str(r)) for r in remarks if r)
        style = ' class="reported"' if reported else ""
        seeds = "-" if reported else str(row["n_seeds"])
        values = "".join(_cell(row, metric) for metric in metrics)
        lines.append(
            f"<tr{style}><td>{html.escape(name)}</td><td>{seeds}</td>{values}"
            f'<td class="remark">{remark}</td></tr>'
        )
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _picture(title: str, path: Path) -> str:
    if not path.is_file():
        raise DataError(f"no picture at '{path}' for '{title}'")
    data = base64.b64encode(path.read_bytes()).decode()
    safe = html.escape(title)
    return f'<h2>{safe}</h2>\n<img alt="{safe}" src="data:image/png;base64,{data}">'


def write_report(
    path: str | Path,
    *,
    title: str,
    board: pd.DataFrame,
    facts: Mapping[str, object],
    pictures: Mapping[str, str | Path],
    warnings: Sequence[str] = (),
    metrics: Sequence[str] | None = None,
) -> Path:
    """Write table and pictures as one HTML file that needs no network and no other file.

    Args:
        path: where to write.
        title: heading.
        board: from :func:`cellray.bench.table.leaderboard`.
        facts: name -> value, shown above the table (data set, split, digests ...).
        pictures: heading -> PNG file.
        warnings: what a reader must know first.
        metrics: ids to show; by default accuracy, macro P, R and F1.

    Returns:
        ``path``.

    Raises:
        DataError: a picture is missing, or a metric that the leaderboard lacks.
    """
    shown = board_metrics(board, metrics)
    safe = html.escape(title)
    named = "".join(
        f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items()
    )
    meaning = "<br>".join(html.escape(line) for line in legend(shown).splitlines())
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f"<title>{safe}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{safe}</h1>\n<dl>{named}</dl>",
        *(f'<p class="warning">{html.escape(text)}</p>' for text in warnings),
        _table(board, shown),
        '<p class="legend">mean ± standard deviation over seeds (n/a: one seed, or no seed '
        f"changes the method)<br>{meaning}</p>",
        *(_picture(name, Path(file)) for name, file in pictures.items()),
        "</body>\n</html>\n",
    ]
    Path(path).write_text("\n".join(parts), encoding="utf-8")
    return Path(path)
