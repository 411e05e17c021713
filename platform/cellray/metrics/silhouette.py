"""Silhouette widths: of labels, of batches within labels, and their batch-removal form (BRAS).

The width of a cell is (b - a) / max(a, b): a its mean distance to the others of its cluster, b to
the nearest other cluster (Rousseeuw 1987, 10.1016/0377-0427(87)90125-7). A cell that is alone in
its cluster, or at distance 0 from everything, has width 0.

- ``asw_label.v1``: (mean width of labels + 1) / 2 (scIB, 10.1038/s41592-021-01336-8).
- ``asw_batch.v1``: per label, the mean of 1 - abs(width by batch); then the mean over labels that
  are in two batches or more and do not have one batch per cell (scIB).
- ``bras.v1``: the same with cosine distance, and b the mean distance to *all* cells of other
  batches (Rautenstrauch and Ohler 2025; the default of scib-metrics since 0.5.6).
- ``isolated_asw.v1``: the mean width of labels, rescaled as above, over the cells of each label
  that is in the fewest batches; then over those labels (scib-metrics' form: widths against the
  nearest other label, not against all the rest).

Euclidean distances are made a block of cells at a time, so memory is bounded; cosine sums need no
pairs at all, as the sum of u.v over v is u times the sum of v.

Legend: N cells, D dimensions, C clusters, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cellray.core.errors import DataError
from cellray.metrics.base import Labels, Metric, by_id, encode_labels
from cellray.metrics.clustering import isolated_labels
from cellray.metrics.neighbours import (
    centred,
    finite_matrix,
    rounding,
    row_blocks,
    squared_distances,
)

__all__ = [
    "METRICS",
    "asw_batch",
    "asw_label",
    "bras",
    "isolated_asw",
    "silhouette_widths",
    "widths_to_all_others",
]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

METRICS: Mapping[str, Metric] = by_id(
    Metric("asw_label.v1", "ASW label", "(mean silhouette width of the labels + 1) / 2"),
    Metric(
        "asw_batch.v1", "ASW batch", "1 - abs(width by batch), mean per label, then over labels"
    ),
    Metric("bras.v1", "BRAS", "ASW batch with cosine distance to all cells of other batches"),
    Metric("isolated_asw.v1", "isolated ASW", "ASW label over the labels in the fewest batches"),
)


def _width(inner: F64, outer: F64) -> F64:
    """(b - a) / max(a, b), and 0 where that has no value."""
    larger = np.maximum(inner, outer)
    fit = np.isfinite(inner) & np.isfinite(outer) & (larger > 0)
    width = np.zeros(len(inner), dtype=np.float64)
    np.divide(outer - inner, larger, out=width, where=fit)
    return width


def _distance_sums(points: F64, codes: I64, num_clusters: int) -> F64:
    """The sum of distances from each cell to each cluster's cells: (N, C)."""
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(num_clusters))
    about, squares = centred(points[order])
    sums = np.empty((len(points), num_clusters), dtype=np.float64)
    same = 4.0 * rounding(points.shape[1])
    for rows in row_blocks(len(points), 8 * len(points)):
        squared = squared_distances(about, squares, rows)
        squared[squared <= same * squares[rows, None]] = 0.0  # duplicates: |x - y| << |x| = |y|
        np.sqrt(squared, out=squared)
        sums[order[rows]] = np.add.reduceat(squared, starts, axis=1)
    return sums


def _widths(points: F64, codes: I64, num_clusters: int) -> F64:
    """Silhouette width of each cell against the nearest other cluster: (N,)."""
    sizes = np.bincount(codes, minlength=num_clusters).astype(np.float64)
    sums = _distance_sums(points, codes, num_clusters)
    own = (np.arange(len(codes)), codes)
    inner = np.full(len(codes), np.nan)
    np.divide(sums[own], sizes[codes] - 1.0, out=inner, where=sizes[codes] > 1)
    sums[own] = np.inf
    return _width(inner, (sums / sizes).min(axis=1))


def _aligned(embedding: npt.ArrayLike, **labels: Labels) -> tuple[F64, dict[str, I64]]:
    """The embedding and the codes of one or two kinds of label of its cells."""
    points = finite_matrix(embedding)
    codes = {kind: encode_labels(values, kind)[0] for kind, values in labels.items()}
    for kind, found in codes.items():
        if len(found) != len(points):
            raise DataError(f"{len(points)} cells but {len(found)} {kind} labels; give one each")
    return points, codes


def silhouette_widths(embedding: npt.ArrayLike, labels: Labels) -> F64:
    """Silhouette width of each cell in Euclidean distance, in -1..1.

    Args:
        embedding: (N, D) finite.
        labels: N labels of two kinds at least.

    Returns:
        (N,) float64.

    Raises:
        DataError: the embedding is not finite or not (N, D), lengths differ, a label is missing, or
            all labels are the same.
    """
    points, codes = _aligned(embedding, cell=labels)
    num_labels = int(codes["cell"].max()) + 1
    if num_labels < 2:
        raise DataError("all cells have one label; a silhouette needs at least two")
    return _widths(points, codes["cell"], num_labels)


def asw_label(widths: F64) -> float:
    """``asw_label.v1`` from the widths of :func:`silhouette_widths`."""
    return float((widths.mean() + 1.0) / 2.0)


def isolated_asw(widths: F64, labels: Labels, batches: Labels) -> float:
    """``isolated_asw.v1`` from the widths of :func:`silhouette_widths`.

    Args:
        widths: (N,) of the labels.
        labels: N labels.
        batches: N batches.

    Raises:
        DataError: lengths differ, or a label or batch is missing.
    """
    codes, names = encode_labels(labels, "cell")
    if len(widths) != len(codes):
        raise DataError(f"{len(widths)} widths but {len(codes)} labels; give one each")
    totals = np.bincount(codes, weights=widths, minlength=len(names))
    means = totals / np.bincount(codes, minlength=len(names))
    return float(((means[isolated_labels(labels, batches)] + 1.0) / 2.0).mean())


def widths_to_all_others(points: F64, codes: I64) -> F64:
    """Cosine silhouette widths with b the mean distance to all cells outside the cluster.

    A cell at the origin has no direction; its cosine distance to every other cell counts as 1.

    Args:
        points: (N, D) finite.
        codes: (N,) int64, 0..C-1, C >= 2.

    Returns:
        (N,) float64.
    """
    norms = np.linalg.norm(points, axis=1, keepdims=True)
    units = np.divide(points, norms, out=np.zeros_like(points), where=norms > 0)
    sizes = np.bincount(codes).astype(np.float64)
    sums = np.stack([units[codes == cluster].sum(axis=0) for cluster in range(len(sizes))])
    size = sizes[codes]
    itself = np.einsum("ij,ij->i", units, units)
    within = (size - 1.0) - (np.einsum("ij,ij->i", units, sums[codes]) - itself)
    outside = np.einsum("ij,ij->i", units, sums.sum(axis=0) - sums[codes])
    inner = np.full(len(codes), np.nan)
    np.divide(within, size - 1.0, out=inner, where=size > 1)
    outer = 1.0 - outside / (len(codes) - size)
    rounding = np.finfo(np.float64).eps * (points.shape[1] + 4)
    inner[inner < rounding], outer[outer < rounding] = 0.0, 0.0  # the same direction
    return _width(inner, outer)


def _mean_over_labels(
    embedding: npt.ArrayLike, labels: Labels, batches: Labels, *, cosine: bool
) -> float:
    """Mean over labels of the mean of 1 - abs(width by batch)."""
    points, codes = _aligned(embedding, cell=labels, batch=batches)
    means = []
    for label in range(int(codes["cell"].max()) + 1):
        cells = np.flatnonzero(codes["cell"] == label)
        found, local = np.unique(codes["batch"][cells], return_inverse=True)
        if not 1 < len(found) < len(cells):
            continue
        part = points[cells]
        widths = widths_to_all_others(part, local) if cosine else _widths(part, local, len(found))
        means.append(float((1.0 - np.abs(widths)).mean()))
    if not means:
        raise DataError(
            "no label has cells of two batches, one of them twice: label and batch are the same "
            "thing here, and mixing within labels cannot be judged"
        )
    return float(np.mean(means))


def asw_batch(embedding: npt.ArrayLike, labels: Labels, batches: Labels) -> float:
    """``asw_batch.v1``: 1 where batches are mixed within every label, 0 where they lie apart.

    A label in one batch only, or with as many batches as cells, is left out. A batch of one cell
    within a label has width 0 and counts as mixed.

    Args:
        embedding: (N, D) finite.
        labels: N labels.
        batches: N batches.

    Raises:
        DataError: the embedding is not finite or not (N, D), lengths differ, a label or batch is
            missing, or no label can be judged.
    """
    return _mean_over_labels(embedding, labels, batches, cosine=False)


def bras(embedding: npt.ArrayLike, labels: Labels, batches: Labels) -> float:
    """``bras.v1``; labels and batches of one cell as in :func:`asw_batch`.

    Args:
        embedding: (N, D) finite.
        labels: N labels.
        batches: N batches.

    Raises:
        DataError: as in :func:`asw_batch`.
    """
    return _mean_over_labels(embedding, labels, batches, cosine=True)
