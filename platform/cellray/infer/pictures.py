"""Pictures of a model's answers: what is gained by refusing cells that it is not sure of."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cellray.metrics.refusal import CoverageCurve, accuracy_at

__all__ = ["plot_coverage"]

_DPI = 150
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
    low = float(min(curve.accuracy.min(), curve.macro_f1.min()))
    axes.set_ylim(max(0.0, low - 0.08), 1.02)
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("coverage: share of the cells that is kept, the surest first", fontsize=9)
    axes.set_ylabel("score of the kept cells", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#E3E3E3", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", fontsize=8, frameon=False)
    heading = f"{title}  ·  " if title else ""
    axes.set_title(f"{heading}AURC {curve.aurc:.4f}", fontsize=10, loc="left")
    figure.savefig(path, dpi=_DPI, facecolor="white")
    return Path(path)
