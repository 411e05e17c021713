"""Two-dimensional pictures of cell embeddings: a reproducible UMAP, and its scatter plots.

Legend: N cells, D width of the embedding.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from cellray.bench.render import shortened
from cellray.core.errors import DataError

__all__ = ["PALETTE", "plot_umap", "umap_embedding"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Labels = Sequence[str] | npt.NDArray[np.generic]

# The first six are Okabe and Ito's (jfly.uni-koeln.de/color, 2008); the others were each chosen
# to be farthest, in CIELAB, from all before it as seen with normal, protan and deutan vision.
PALETTE = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#0000FF", "#691E00"),
    *("#4B2D4B", "#2D1EA5", "#69F096", "#5A78FF", "#FFC3D2", "#E10F4B", "#2D2D78", "#F0965A"),
    *("#3C4BF0", "#963C00", "#4B96F0", "#4B693C"),
)
_REST = "#BDBDBD"
_MISSING = "no value"
_NUMBERED_FROM = 7  # classes; fewer are told apart by colour alone
_COMPACT = 0.45  # a class whose median distance to its centre is below it gets its number drawn
_NAME_WIDTH = 34
_PANEL_INCHES = 4.6
_DPI = 150


def umap_embedding(
    embedding: npt.NDArray[np.floating],
    *,
    seed: int,
    num_neighbors: int = 15,
    min_dist: float = 0.3,
) -> F32:
    """Lay cells out in two dimensions (UMAP, McInnes et al. 2018, doi:10.21105/joss.00861).

    Deterministic given its arguments: one thread, fixed random state.

    Args:
        embedding: (N, D) cell vectors.
        seed: random state of layout and start.
        num_neighbors: cells that count as near; at most N - 1 are taken.
        min_dist: how tight neighbours may lie, 0..1.

    Returns:
        (N, 2) float32.

    Raises:
        DataError: fewer than 4 cells, or a value that is not finite.
    """
    vectors = np.ascontiguousarray(embedding, dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) < 4:
        raise DataError(
            f"UMAP needs at least 4 cells as rows of a matrix; the embedding is {vectors.shape}"
        )
    if not np.isfinite(vectors).all():
        bad = int((~np.isfinite(vectors)).any(axis=1).sum())
        raise DataError(f"the embeddings of {bad} of {len(vectors)} cells are not finite")
    with warnings.catch_warnings():
        # its optional Tensorflow half is not wanted; and a neighbour graph may have islands, which
        # UMAP places by their centres
        warnings.filterwarnings("ignore", category=ImportWarning)
        warnings.filterwarnings("ignore", message=".*(spectral|disconnected|fully connected).*")
        from umap import UMAP  # compiles on import: seconds that only a picture should cost

        layout = UMAP(
            n_neighbors=min(num_neighbors, len(vectors) - 1),
            min_dist=min_dist,
            random_state=seed,
            n_jobs=1,
            init="spectral" if len(vectors) > 10 else "random",
        )
        return np.asarray(layout.fit_transform(vectors), dtype=np.float32)


@dataclass(frozen=True)
class _Colouring:
    """One panel's classes; ``order`` also names those that are lumped together as grey.

    Shapes:
        codes: (N,) int64 into ``names`` and ``colours``.
    """

    codes: I64
    names: list[str]
    colours: list[str]
    order: list[str]

    @property
    def num_coloured(self) -> int:
        """Classes with a colour, and a number, of their own."""
        return sum(colour != _REST for colour in self.colours)


def _texts(labels: Labels, num: int, title: str) -> npt.NDArray[np.str_]:
    values = np.asarray(labels, dtype=object)
    if values.shape != (num,):
        raise DataError(f"'{title}' has {len(values)} labels but there are {num} cells")
    return np.where(pd.isna(values), _MISSING, values.astype(str)).astype(str)


def _colouring(texts: npt.NDArray[np.str_], earlier: Sequence[_Colouring]) -> _Colouring:
    """Classes most frequent first; those that an earlier panel all shows keep its colours."""
    names, counts = np.unique(texts, return_counts=True)
    order = [str(n) for n in names[np.argsort(-counts, kind="stable")] if n != _MISSING]
    same = [panel.order for panel in earlier if set(order) <= set(panel.order)]
    order = same[0] if same else order
    kept = order if len(order) <= len(PALETTE) else order[: len(PALETTE) - 1]
    rest = [f"{len(order) - len(kept)} other classes"] if len(order) > len(kept) else []
    rest += [_MISSING] if _MISSING in names else []
    code_of = {name: code for code, name in enumerate(kept)}
    codes = np.array([code_of.get(str(text), len(kept)) for text in texts], dtype=np.int64)
    shown = [*kept, *([" or ".join(rest)] if rest else [])]
    colours = [*PALETTE[: len(kept)], *([_REST] if rest else [])]
    return _Colouring(codes, shown, colours, order)


def _draw_panel(axes: Any, coords: F64, panel: _Colouring) -> None:
    # a fixed shuffle, so that no class is painted over another as a whole; grey lies below all
    order = np.random.default_rng(0).permutation(len(coords))
    order = order[np.argsort(panel.codes[order] < panel.num_coloured, kind="stable")]
    axes.scatter(
        coords[order, 0],
        coords[order, 1],
        c=np.array(panel.colours, dtype=object)[panel.codes[order]].tolist(),
        s=float(np.clip(16_000 / len(coords), 0.6, 28)),
        linewidths=0,
        alpha=0.85 if len(coords) < 20_000 else 0.6,
        rasterized=True,
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.05)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_color("#D0D0D0")
    if panel.num_coloured >= _NUMBERED_FROM:
        _number_classes(axes, coords, panel)


def _number_classes(axes: Any, coords: F64, panel: _Colouring) -> None:
    """Write a class's legend number at the middle of it, where it has one and there is room."""
    centre = np.median(coords, axis=0)
    spread = float(np.median(np.linalg.norm(coords - centre, axis=1)))
    room = 0.04 * float(np.ptp(coords, axis=0).max())
    taken: list[F64] = []
    for code in range(panel.num_coloured):
        cells = coords[panel.codes == code]
        if not len(cells):
            continue
        away = np.linalg.norm(cells - np.median(cells, axis=0), axis=1)
        medoid = cells[np.argmin(away)]
        near = any(float(np.linalg.norm(medoid - other)) < room for other in taken)
        if near or float(np.median(away)) > _COMPACT * spread:
            continue
        taken.append(medoid)
        few = len(cells) < max(30, len(coords) // 50)  # a number on top would hide them
        left = bool(medoid[0] > centre[0])
        axes.annotate(
            str(code + 1),
            medoid,
            xytext=((-5 if left else 5), 5) if few else (0, 0),
            textcoords="offset points",
            ha=("right" if left else "left") if few else "center",
            va="bottom" if few else "center",
            fontsize=8,
            fontweight="bold",
            color="#1A1A1A",
            path_effects=[withStroke(linewidth=2.2, foreground="white")],
        )


def _draw_legend(axes: Any, panel: _Colouring) -> None:
    counts = np.bincount(panel.codes, minlength=len(panel.names))
    numbered = panel.num_coloured if panel.num_coloured >= _NUMBERED_FROM else 0
    prefix = [f"{code + 1}  " if code < numbered else "" for code in range(len(panel.names))]
    entries = [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            markersize=6,
            color=panel.colours[code],
            label=f"{prefix[code]}{shortened(name, _NAME_WIDTH)} ({counts[code]:,})",
        )
        for code, name in enumerate(panel.names)
        if counts[code]
    ]
    axes.legend(
        handles=entries,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0,
        frameon=False,
        fontsize=8,
        handletextpad=0.3,
        labelspacing=0.35,
    )


def plot_umap(
    coords: npt.NDArray[np.floating],
    *,
    colours: Mapping[str, Labels],
    path: str | Path,
    title: str = "",
) -> Path:
    """Draw the same layout once for each colouring, side by side, and save it as PNG.

    Classes are ordered by size; with 7 or more they are numbered, and a compact class carries its
    number in the picture, so that the legend can be read without telling colours apart. A panel
    whose classes all occur in an earlier one (predictions) shares its colours. Beyond 20 classes
    the smaller ones are grey.

    Args:
        coords: (N, 2) from :func:`umap_embedding`.
        colours: panel title -> N labels (cell type, donor, prediction ...).
        path: where to write; its folder must exist.
        title: heading of the picture.

    Returns:
        ``path``.

    Raises:
        DataError: not two columns, a value that is not finite, nothing to colour by, or labels of
            another length.
    """
    points = np.asarray(coords, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise DataError(f"a picture needs (N, 2) coordinates; these are {points.shape}")
    if not np.isfinite(points).all():
        bad = int((~np.isfinite(points)).any(axis=1).sum())
        raise DataError(f"the coordinates of {bad} of {len(points)} cells are not finite")
    if not colours:
        raise DataError("nothing to colour the picture by; give at least one column of labels")
    panels: list[_Colouring] = []
    for name, labels in colours.items():
        panels.append(_colouring(_texts(labels, len(points), name), panels))
    num = len(panels)
    size = (num * (_PANEL_INCHES + 2.0), _PANEL_INCHES + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name, panel in zip(
        figure.subplots(1, num, squeeze=False)[0], colours, panels, strict=True
    ):
        _draw_panel(axes, points, panel)
        _draw_legend(axes, panel)
        axes.set_title(name, fontsize=11, loc="left")
        axes.set_xlabel("UMAP 1", fontsize=8, color="#707070", loc="left")
        axes.set_ylabel("UMAP 2", fontsize=8, color="#707070", loc="bottom")
    heading = title or "UMAP"
    figure.suptitle(f"{heading}  ·  {len(points):,} cells", fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=_DPI, facecolor="white")
    return Path(path)
