"""Pictures of a model's answers: what is gained by refusing cells that it is not sure of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cellray.metrics.refusal import CoverageCurve, accuracy_at

__all__ = ["plot_coverage", "plot_curves"]

_DPI = 150
# Okabe and Ito's, without the yellow that white paper swallows
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#1A1A1A")
_ACCURACY, _MACRO_F1, _INK = "#0072B2", "#D55E00", "#1A1A1A"


def plot_coverage(
    curve: CoverageCurve, *, path: str | Path, title: str = "", threshold: float | None = None
) -> Path:
    """Draw accuracy and macro-F1 of the kept cells against the share that is kept.

    Args:
        curve: of test cells.
        path: PNG to write; its folder must exist.
        title: heading.
        threshold: where the model refuses; marked if it refuses any cell and keeps some.

    Returns:
        ``path``.
    """
    figure = Figure(figsize=(5.4, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for values, colour, name in (
        (curve.accuracy, _ACCURACY, "accuracy"),
        (curve.macro_f1, _MACRO_F1, "macro F1 (union)"),
    ):
        axes.plot(
            curve.coverage,
            values,
            color=colour,
            label=f"{name}: {values[-1]:.3f} of all cells",
            drawstyle="steps-post",
            linestyle="-" if colour == _ACCURACY else "--",
            linewidth=1.6,
        )
    kept = (
        float((curve.coverage[curve.thresholds >= threshold]).max(initial=0.0))
        if (threshold is not None)
        else 1.0
    )
    if threshold is not None and 0 < kept < 1:
        axes.axvline(kept, color=_INK, linewidth=0.9, linestyle=":")
        axes.annotate(
            f"refused below {threshold:.3g}\nkept {kept:.1%}, accuracy "
            f"{accuracy_at(curve, kept):.3f}",
            (kept, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(-5 if kept > 0.5 else 5, 0),
            textcoords="offset points",
            ha="right" if kept > 0.5 else "left",
            fontsize=8,
            color=_INK,
        )
    _finish(axes, float(min(curve.accuracy.min(), curve.macro_f1.min())), "score")
    axes.legend(loc="best", fontsize=8, frameon=False)
    heading = f"{title}  ·  " if title else ""
    axes.set_title(f"{heading}AURC {curve.aurc:.4f}", fontsize=10, loc="left")
    figure.savefig(path, dpi=_DPI, facecolor="white")
    return Path(path)


def _finish(axes: Any, low: float, what: str) -> None:
    """Limits, labels and grid of a coverage picture."""
    axes.set_ylim(max(0.0, low - 0.08), 1.02)
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("coverage: share of the cells that is kept, the surest first", fontsize=9)
    axes.set_ylabel(f"{what} of the kept cells", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#E3E3E3", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def plot_curves(curves: Mapping[str, CoverageCurve], *, path: str | Path, title: str = "") -> Path:
    """Draw the accuracy of the kept cells against the share kept, one line a method.

    Args:
        curves: method -> its curve, all of the same test cells; the best (AURC) is listed first.
        path: PNG to write; its folder must exist.
        title: heading.

    Returns:
        ``path``.
    """
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ranked = sorted(curves.items(), key=lambda item: (item[1].aurc, item[0]))
    for place, (name, curve) in enumerate(ranked):
        axes.plot(
            curve.coverage,
            curve.accuracy,
            color=_COLOURS[place % len(_COLOURS)],
            linestyle=("-", "--", ":")[place // len(_COLOURS) % 3],
            label=f"{name}  (AURC {curve.aurc:.3f})",
            drawstyle="steps-post",
            linewidth=1.5,
        )
    _finish(axes, float(min(curve.accuracy.min() for curve in curves.values())), "accuracy")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    axes.set_title(title, fontsize=10, loc="left")
    figure.savefig(path, dpi=_DPI, facecolor="white")
    return Path(path)
