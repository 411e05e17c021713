"""A sweep as one picture: parallel coordinates, a line a trial, from its values to its metric."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cellray.core.errors import DataError
from cellray.tune.ledger import FAILED, FINISHED, STOPPED

__all__ = ["draw_sweep"]

_DPI = 150
_INK, _FAINT, _BAD, _BEST = "#1A1A1A", "#8A8A8A", "#B00020", "#D55E00"
_LABEL_CHARS = 18
_MOST_TICKS = 12
_MANY = 10
_STRETCH = 5.0  # a positive metric that spans more than this is drawn on a logarithmic axis
_LANE = 0.035  # lines that meet at a choice are drawn this far apart, at most


@dataclass(frozen=True)
class _Scale:
    """One vertical axis.

    Attributes:
        name: key path or metric.
        heights: of the trials, 0 below to 1 above; NaN where there is none.
        ticks: height -> label.
        log: logarithmic.
        choice: a list of values rather than a number line.
    """

    name: str
    heights: npt.NDArray[np.float64]
    ticks: Mapping[float, str]
    log: bool
    choice: bool = False


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LABEL_CHARS else f"…{text[1 - _LABEL_CHARS :]}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool | np.bool_)


def _choice(name: str, values: Sequence[Any]) -> _Scale:
    """Values by name, evenly spaced; numbers in their order, others as they come."""
    texts = [_text(v.item() if isinstance(v, np.generic) else v) for v in values]
    numbers = all(_is_number(v) for v in values)
    pairs = dict(zip(texts, values, strict=True))
    names = sorted(pairs, key=lambda t: float(pairs[t])) if numbers else list(pairs)
    if len(names) == 1:
        spots = {names[0]: 0.5}
    else:
        spots = {text: 0.06 + 0.88 * i / (len(names) - 1) for i, text in enumerate(names)}
    every = math.ceil(len(names) / _MOST_TICKS)
    ticks = {spots[text]: text for text in names[::every]}
    return _Scale(name, np.array([spots[t] for t in texts]), ticks, False, choice=True)


def _line(name: str, values: npt.NDArray[np.float64], *, log: bool) -> _Scale:
    """Numbers on a linear or logarithmic axis that just holds them."""
    finite = values[np.isfinite(values)]
    moved = np.log10(values) if log else values
    low, high = (math.log10(finite.min()), math.log10(finite.max())) if log else (
        float(finite.min()), float(finite.max()))  # fmt: skip
    if high - low < 1e-12:
        pad = abs(low) * 0.1 or 0.5
        low, high = low - pad, high + pad
    margin = (high - low) * 0.05
    low, high = low - margin, high + margin
    marks = _log_marks(low, high) if log else MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(
        low, high)  # fmt: skip
    digits = max((_digits(m) for m in np.diff(marks)), default=0) if not log else 0
    ticks = {}
    for mark in marks:
        place = (math.log10(mark) if log else mark) - low
        if -1e-9 <= place / (high - low) <= 1 + 1e-9:
            label = (
                _power(mark)
                if log
                else f"{mark:g}"
                if abs(mark) >= 1e5 or digits > 5
                else f"{mark:.{digits}f}"
            )
            ticks[place / (high - low)] = label
    return _Scale(name, (moved - low) / (high - low), ticks, log)


def _power(mark: float) -> str:
    """``1e-5`` rather than ``1e-05``; plain from a hundredth to ten thousand."""
    if 0.01 <= mark < 1e4:
        return f"{mark:g}"
    lead, _, power = f"{mark:.0e}".partition("e")
    return f"{lead}e{int(power)}"


def _digits(step: float) -> int:
    return max(0, -math.floor(math.log10(abs(step)) + 1e-9)) if step else 0


def _log_marks(low: float, high: float) -> list[float]:
    """Round numbers between two powers of ten: 1, or 1, 2 and 5, as there is room."""
    decades = range(math.floor(low) - 1, math.ceil(high) + 1)
    for leads in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        marks = [lead * 10.0**d for d in decades for lead in leads]
        inside = [m for m in marks if low - 1e-9 <= math.log10(m) <= high + 1e-9]
        if len(inside) >= 4:
            return inside
    return [10**low, 10**high]


def _scales(
    table: pd.DataFrame, keys: Sequence[str], log: Sequence[str], metric: str
) -> list[_Scale]:
    made = []
    for key in keys:
        values = table[key].tolist()
        numbers = [v for v in values if _is_number(v)]
        few = len({repr(v) for v in values}) <= 4 and key not in log
        if len(numbers) < len(values) or few:
            made.append(_choice(key, values))
        else:
            made.append(_line(key, np.array(values, dtype=float), log=key in log))
    value = table[metric].to_numpy(dtype=float)
    finite = value[np.isfinite(value)]
    stretched = bool(finite.min() > 0 and finite.max() / finite.min() > _STRETCH)
    return [*made, _line(metric, value, log=stretched)]


def _apart(scale: _Scale) -> npt.NDArray[np.float64]:
    """Heights with the lines that meet at a choice drawn beside each other."""
    heights = scale.heights.copy()
    if not scale.choice:
        return heights
    for spot in np.unique(heights):
        rows = np.flatnonzero(heights == spot)
        lane = min(_LANE, 0.12 / max(len(rows) - 1, 1))
        heights[rows] += (np.arange(len(rows)) - (len(rows) - 1) / 2) * lane
    return heights


def _curve(heights: npt.NDArray[np.float64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """A line that crosses every axis level, so that one can be followed through the others."""
    t = np.linspace(0, 1, 30)
    ease = t * t * (3 - 2 * t)
    xs = [i + t for i in range(len(heights) - 1)]
    ys = [a + (b - a) * ease for a, b in itertools.pairwise(heights)]
    return np.concatenate(xs), np.concatenate(ys)


def _draw_axes(axes: Any, scales: Sequence[_Scale]) -> None:
    for x, scale in enumerate(scales):
        last = x == len(scales) - 1
        axes.plot([x, x], [0, 1], color=_INK, linewidth=1.4 if last else 0.9, zorder=3)
        for height, label in scale.ticks.items():
            axes.plot([x - 0.012, x + 0.012], [height, height], color=_INK, lw=0.9, zorder=3)
            side = {"ha": "left", "x": x + 0.03} if last else {"ha": "right", "x": x - 0.03}
            axes.text(
                side["x"], height, label, ha=side["ha"], va="center", fontsize=8, color=_INK,
                zorder=12,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
            )  # fmt: skip
        name = "\n".join(textwrap.wrap(scale.name.replace(".", ". ").replace("/", "/ "), 20))
        name = name.replace(". ", ".").replace("/ ", "/")
        axes.text(
            x, 1.05, name + ("\n(log)" if scale.log else ""), ha="center", va="bottom",
            fontsize=9, fontweight="bold" if last else "normal", color=_INK,
        )  # fmt: skip


def _draw_lines(
    axes: Any, table: pd.DataFrame, scales: Sequence[_Scale], colours: Any, best: int
) -> None:
    heights = np.stack([_apart(scale) for scale in scales], axis=1)
    metric = len(scales) - 1
    for row, (_, trial) in enumerate(table.iterrows()):
        at, value = heights[row], float(trial[scales[-1].name])
        without = not math.isfinite(value) or trial["state"] == FAILED
        if without:
            at = np.append(at[:metric], -0.1)
            xs, ys = _curve(at)
            failed = trial["state"] == FAILED
            colour = _BAD if failed else _FAINT
            axes.plot(xs, ys, color=colour, lw=1.1, ls=":", zorder=2, alpha=0.9)
            axes.plot([metric], [-0.1], "x" if failed else "o", color=colour, ms=7, mew=2, zorder=5)
            continue
        xs, ys = _curve(at)
        ended = trial["state"] == FINISHED
        style = "-" if ended else ((0, (5, 2)) if trial["state"] == STOPPED else (0, (1, 1.5)))
        if trial["trial"] == best:
            axes.plot(xs, ys, color="white", lw=6.5, zorder=7)
            axes.plot(xs, ys, color=_BEST, lw=4.2, zorder=8, ls="-" if ended else style)
            axes.plot(range(len(at)), at, "o", color="white", mec=_BEST, mew=1.8, ms=6, zorder=9)
            continue
        axes.plot(
            xs, ys, color=colours(value), lw=2.0 if ended else 1.5, ls=style, zorder=4,
            alpha=0.95 if ended else 0.75,
        )  # fmt: skip


def _legend(axes: Any, table: pd.DataFrame, best: int, told: str) -> None:
    states = table["state"].value_counts()
    entries = [Line2D([], [], color=_BEST, lw=4, marker="o", mfc="white", mec=_BEST, label=told)]
    styles: list[tuple[str, Any, str]] = [
        (FINISHED, "-", _INK),
        (STOPPED, (0, (5, 2)), _INK),
        ("not finished", (0, (1, 1.5)), _INK),
        (FAILED, ":", _BAD),
    ]
    for state, style, colour in styles:
        if state in states.index:
            mark = "x" if state == FAILED else ""
            label = f"{state} ({states[state]})"
            entries.append(
                Line2D([], [], color=colour, ls=style, lw=1.6, marker=mark, mew=2, label=label)
            )
    axes.legend(
        handles=entries, loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False,
        ncols=len(entries), fontsize=8, handlelength=2.6, columnspacing=1.6,
    )  # fmt: skip


def draw_sweep(
    table: pd.DataFrame,
    *,
    keys: Sequence[str],
    log: Sequence[str],
    metric: str,
    mode: str,
    best: int,
    path: str | Path,
    title: str = "",
) -> Path:
    """Draw a sweep as parallel coordinates.

    Every searched key is an axis, the metric the last one; a trial is a line, coloured by its
    metric. A trial that failed ends at a cross below the metric's axis.

    Args:
        table: one row a trial: ``trial``, the keys, the metric, ``state``.
        keys: searched keys, in the order of the axes.
        log: those that were searched on a logarithmic scale.
        metric: column that trials were compared by.
        mode: ``min`` or ``max``.
        best: number of the best trial.
        path: PNG to write; its folder must exist.
        title: heading.

    Returns:
        ``path``.

    Raises:
        DataError: no trial has a metric.
    """
    table = table.reset_index(drop=True)
    values = table[metric].to_numpy(dtype=float)
    scored = values[np.isfinite(values)]
    if not len(scored):
        raise DataError(f"no trial has a value of {metric}; there is nothing to draw")
    scales = _scales(table, keys, log, metric)
    figure = Figure(figsize=(max(7.0, 1.9 * len(scales) + 2.2), 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # worst is light, best is dark; of many trials the worst tenth does not stretch the colours
    low, high = float(scored.min()), float(scored.max())
    if len(scored) >= _MANY:
        worst = float(np.quantile(scored, 0.9 if mode == "min" else 0.1))
        low, high = (low, worst) if mode == "min" else (worst, high)
    least = 1e-3 * max(abs(low), 1e-6)  # values as good as equal get one colour, and plain ticks
    norm = Normalize(low, max(high, low + least), clip=True)
    cmap = colormaps["viridis" if mode == "min" else "viridis_r"]
    mappable = ScalarMappable(norm, cmap)
    _draw_axes(axes, scales)
    _draw_lines(axes, table, scales, mappable.to_rgba, best)
    value = float(table.loc[table["trial"] == best, metric].iloc[0])
    _legend(axes, table, best, f"best: trial {best}, {metric} = {value:.4g}")
    bar = figure.colorbar(mappable, ax=axes, shrink=0.7, pad=0.02, extend=_beyond(scored, norm))
    bar.set_label(f"{metric} ({'lower' if mode == 'min' else 'higher'} is better)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    axes.set_xlim(-0.45, len(scales) - 1 + 0.35)
    axes.set_ylim(-0.16 if len(scored) < len(table) else -0.05, 1.08)
    axes.set_axis_off()
    heading = f"{title}  ·  " if title else ""
    figure.suptitle(f"{heading}{len(table)} trials", fontsize=11, x=0.02, ha="left")
    figure.savefig(path, dpi=_DPI, facecolor="white")
    return Path(path)


def _beyond(values: npt.NDArray[np.float64], norm: Normalize) -> str:
    """Which end of the colour bar stands for values beyond it."""
    above, below = bool(values.max() > norm.vmax), bool(values.min() < norm.vmin)
    return "both" if above and below else "max" if above else "min" if below else "neither"
