"""Two-dimensional pictures of cell embeddings: a reproducible UMAP, and its scatter plots.

Legend: N cells, D width of the embedding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from cellray.core.errors import DataError

__all__ = ["PALETTE", "plot_umap", "umap_embedding"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
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
_PANEL_INCHES = 4.6
_LEGEND_ROWS = 24
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


def _classes(labels: Labels, num: int, title: str) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Codes and names, most frequent first; beyond 20 classes the rest is one grey class."""
    values = np.asarray(labels, dtype=object)
    if values.shape != (num,):
        raise DataError(f"'{title}' colours {values.shape} labels but there are {num} cells")
    missing = [v is None or v != v for v in values]
    texts = np.where(missing, _MISSING, values.astype(str)).astype(str)
    names, counts = np.unique(texts, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    names = names[order]
    named = [str(n) for n in names if n != _MISSING]
    kept = named if len(named) <= len(PALETTE) else named[: len(PALETTE) - 1]
    code_of = {name: code for code, name in enumerate(kept)}
    codes = np.array([code_of.get(text, len(kept)) for text in texts], dtype=np.int64)
    rest = []
    if len(named) > len(kept):
        rest.append(f"{len(named) - len(kept)} other classes")
    if _MISSING in names:
        rest.append(_MISSING)
    return codes, [*kept, *([" or ".join(rest)] if rest else [])]


def _palette_of(num: int, *, has_rest: bool) -> list[str]:
    return [*PALETTE[: num - has_rest], *([_REST] if has_rest else [])]


def _draw_panel(
    axes: Any, coords: F64, codes: npt.NDArray[np.int64], names: list[str], colours: list[str]
) -> None:
    # a fixed shuffle, so that no class is painted over another as a whole
    order = np.random.default_rng(0).permutation(len(coords))
    size = float(np.clip(9000 / len(coords), 0.6, 28))
    axes.scatter(
        coords[order, 0],
        coords[order, 1],
        c=np.array(colours, dtype=object)[codes[order]].tolist(),
        s=size,
        linewidths=0,
        alpha=0.85 if len(coords) < 20_000 else 0.6,
        rasterized=True,
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.04)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_color("#D0D0D0")
    if len(names) >= _NUMBERED_FROM:
        _number_classes(axes, coords, codes, len(names))


def _number_classes(axes: Any, coords: F64, codes: npt.NDArray[np.int64], num: int) -> None:
    """Write a class's legend number at the middle of it, where it has one."""
    spread = float(np.median(np.linalg.norm(coords - np.median(coords, axis=0), axis=1)))
    for code in range(num):
        cells = coords[codes == code]
        centre = np.median(cells, axis=0)
        around = np.median(np.linalg.norm(cells - centre, axis=1))
        if around > _COMPACT * spread:
            continue
        medoid = cells[np.argmin(np.linalg.norm(cells - centre, axis=1))]
        axes.text(
            *medoid,
            str(code + 1),
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold",
            color="#1A1A1A",
            path_effects=[withStroke(linewidth=2.2, foreground="white")],
        )


def _draw_legend(
    axes: Any, codes: npt.NDArray[np.int64], names: list[str], colours: list[str]
) -> None:
    counts = np.bincount(codes, minlength=len(names))
    numbered = len(names) >= _NUMBERED_FROM
    entries = [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            markersize=6,
            color=colour,
            label=f"{f'{i + 1}  ' if numbered else ''}{_shortened(name)} ({count:,})",
        )
        for i, (name, colour, count) in enumerate(zip(names, colours, counts, strict=True))
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
        ncols=math.ceil(len(entries) / _LEGEND_ROWS),
    )


def _shortened(name: str, width: int = 34) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


def plot_umap(
    coords: npt.NDArray[np.floating],
    *,
    colours: Mapping[str, Labels],
    path: str | Path,
    title: str = "",
) -> Path:
    """Draw the same layout once for each colouring, side by side, and save it as PNG.

    Classes are numbered by size; with 7 or more, a compact class carries its number in the
    picture too, so that the legend can be read without telling colours apart. Beyond 20 classes
    the smaller ones are grey.

    Args:
        coords: (N, 2) from :func:`umap_embedding`.
        colours: panel title -> N labels (cell type, donor, prediction ...).
        path: where to write; its folder must exist.
        title: heading of the picture.

    Returns:
        ``path``.

    Raises:
        DataError: not two columns, nothing to colour by, or labels of another length.
    """
    points = np.asarray(coords, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise DataError(f"a picture needs (N, 2) coordinates; these are {points.shape}")
    if not colours:
        raise DataError("nothing to colour the picture by; give at least one column of labels")
    prepared = {name: _classes(labels, len(points), name) for name, labels in colours.items()}
    num = len(prepared)
    figure = Figure(
        figsize=(num * (_PANEL_INCHES + 2.0), _PANEL_INCHES + 0.6), layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, num, squeeze=False)[0]
    for axes, (name, (codes, names)) in zip(panels, prepared.items(), strict=True):
        has_rest = names[-1] == _MISSING or names[-1].endswith(("other classes", _MISSING))
        chosen = _palette_of(len(names), has_rest=has_rest)
        _draw_panel(axes, points, codes, names, chosen)
        _draw_legend(axes, codes, names, chosen)
        axes.set_title(name, fontsize=11, loc="left")
        axes.set_xlabel("UMAP 1", fontsize=8, color="#707070", loc="left")
        axes.set_ylabel("UMAP 2", fontsize=8, color="#707070", loc="bottom")
    heading = title or "UMAP"
    figure.suptitle(f"{heading}  ·  {len(points):,} cells", fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=_DPI, facecolor="white")
    return Path(path)
