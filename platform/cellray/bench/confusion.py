"""Which class is taken for which, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cellray.core.errors import DataError
from cellray.metrics.classification import confusion_matrix

__all__ = ["plot_confusion"]

Labels = Sequence[str] | npt.NDArray[np.generic]

_DPI = 150
_MOST_CLASSES = 60


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
