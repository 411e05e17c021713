"""Are batches mixed, and labels not? LISI, graph connectivity, principal component regression.

LISI (Korsunsky 2019, 10.1038/s41592-019-0619-0): the neighbours of a cell get weights
exp(-beta d) whose entropy is log(perplexity); LISI is the inverse Simpson index of their labels,
1 / sum over labels of (sum of weights)^2: the number of labels effectively among them. Ninety
neighbours, the cell itself counted but without weight; perplexity 30. The scaled forms are scIB's
(10.1038/s41592-021-01336-8), from the median over cells.

Graph connectivity (scIB): per label the share of its cells in the largest connected part of its own
subgraph, mean over labels. Two conventions with two ids, 15 neighbours each, the cell itself
counted: ``symmetric``, an edge if either is a neighbour of the other (scib); ``directed``, strongly
connected parts of the graph of neighbours (scib-metrics). A label of one cell counts 1.

Principal component regression (Buettner 2019, 10.1038/s41592-018-0254-1): sum over components of
variance times R^2 of the batch, over the total variance. Over all components that is the variance
between batches over the total variance, whatever the rotation; so no PCA is made.

Legend: N cells, D dimensions, K neighbours, L labels, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from cellray.core.errors import DataError
from cellray.metrics.base import Labels, Metric, by_id, encode_labels
from cellray.metrics.neighbours import Neighbours, finite_matrix, row_blocks

__all__ = [
    "METRICS",
    "clisi",
    "graph_connectivity",
    "ilisi",
    "lisi",
    "neighbour_weights",
    "pcr",
    "pcr_comparison",
]

F64 = npt.NDArray[np.float64]

METRICS: Mapping[str, Metric] = by_id(
    Metric("ilisi.v1", "iLISI", "(median LISI of batches - 1) / (batches - 1)"),
    Metric("clisi.v1", "cLISI", "(labels - median LISI of labels) / (labels - 1)"),
    Metric(
        "graph_connectivity.symmetric.v1",
        "connectivity (symmetric)",
        "largest connected part of each label in the 15-neighbour graph, edges both ways",
    ),
    Metric(
        "graph_connectivity.directed.v1",
        "connectivity (directed)",
        "largest strongly connected part of each label in the directed 15-neighbour graph",
    ),
    Metric("pcr.v1", "PCR", "share of the variance that lies between batches", False),
    Metric("pcr_comparison.v1", "PCR comparison", "(PCR before - PCR after) / PCR before, 0 up"),
)

_ENTROPY_ERROR = 1e-7
_HALVINGS = 100


def _entropy(distances: F64, beta: F64) -> tuple[F64, F64]:
    """Weights and their entropy in nats. (R, K) and (R,); distances start at 0 in each row."""
    weights: F64 = np.exp(-distances * beta[:, None])
    total = weights.sum(axis=1)
    mean = np.einsum("ij,ij->i", weights, distances) / total
    entropy: F64 = np.log(total) + beta * mean
    weights /= total[:, None]
    return weights, entropy


def _weights_of(distances: F64, perplexity: float) -> F64:
    """The weights of a block; entropy falls as beta grows, so bisection finds it."""
    beyond = distances - distances.min(axis=1, keepdims=True)  # the weights do not change
    spread = beyond.mean(axis=1)
    beta = 1.0 / np.where(spread > 0, spread, 1.0)
    low, high = np.zeros(len(beta)), np.full(len(beta), np.inf)
    found: F64 = np.empty_like(beyond)
    left = np.arange(len(beta))
    target = np.log(perplexity)
    for _ in range(_HALVINGS):
        found[left], entropy = _entropy(beyond[left], beta[left])
        wide = entropy > target
        low[left] = np.where(wide, beta[left], low[left])
        high[left] = np.where(wide, high[left], beta[left])
        left = left[np.abs(entropy - target) > _ENTROPY_ERROR]
        if not len(left):
            break
        # more ties at the least distance than the perplexity: beta grows until the rest is 0
        doubled = np.minimum(beta[left] * 2.0, np.finfo(np.float64).max / 4)
        middle = (low[left] + high[left]) / 2.0
        beta[left] = np.where(np.isinf(high[left]), doubled, middle)
    return found


def neighbour_weights(neighbours: Neighbours, *, perplexity: float) -> F64:
    """The weights of each cell's neighbours, summing to 1, of entropy log(perplexity).

    Where more neighbours than the perplexity tie at the least distance, they share all weight.

    Args:
        neighbours: K nearest other cells of N cells.
        perplexity: effective number of neighbours, above 0 and below K.

    Returns:
        (N, K) float64.

    Raises:
        DataError: the perplexity is not between 0 and K.
    """
    if not 1 <= perplexity < neighbours.k:
        raise DataError(
            f"perplexity {perplexity} with {neighbours.k} neighbours; give 1 to fewer than there "
            "are, usually a third of them"
        )
    found = np.empty_like(neighbours.distances)
    for rows in row_blocks(neighbours.num_cells, 64 * neighbours.k):
        found[rows] = _weights_of(neighbours.distances[rows], perplexity)
    return found


def lisi(neighbours: Neighbours, weights: F64, labels: Labels) -> F64:
    """The effective number of labels among each cell's neighbours, 1 to L.

    Args:
        neighbours: K nearest other cells of N cells.
        weights: (N, K) from :func:`neighbour_weights`.
        labels: N labels or batches.

    Returns:
        (N,) float64.

    Raises:
        DataError: lengths differ, or a label is missing.
    """
    codes, names = encode_labels(labels, "cell or batch")
    if len(codes) != neighbours.num_cells or weights.shape != neighbours.indices.shape:
        raise DataError(
            f"{len(codes)} labels and weights of shape {weights.shape} for neighbours of shape "
            f"{neighbours.indices.shape}; they must be of the same cells"
        )
    found = np.empty(len(codes), dtype=np.float64)
    for rows in row_blocks(len(codes), 64 * max(neighbours.k, len(names))):
        flat = codes[neighbours.indices[rows]]
        flat += len(names) * np.arange(len(flat))[:, None]
        shares = np.bincount(
            flat.ravel(), weights=weights[rows].ravel(), minlength=len(flat) * len(names)
        ).reshape(len(flat), len(names))
        found[rows] = 1.0 / np.einsum("ij,ij->i", shares, shares)
    return found


def ilisi(per_cell: F64, num_batches: int) -> float:
    """``ilisi.v1`` from :func:`lisi` of the batches: 0 apart, 1 evenly mixed.

    Raises:
        DataError: there are fewer than two batches.
    """
    if num_batches < 2:
        raise DataError(f"iLISI of {num_batches} batch; it needs at least two")
    return float((np.median(per_cell) - 1.0) / (num_batches - 1))


def clisi(per_cell: F64, num_labels: int) -> float:
    """``clisi.v1`` from :func:`lisi` of the labels: 1 apart, 0 evenly mixed.

    Raises:
        DataError: there are fewer than two labels.
    """
    if num_labels < 2:
        raise DataError(f"cLISI of {num_labels} label; it needs at least two")
    return float((num_labels - np.median(per_cell)) / (num_labels - 1))


def graph_connectivity(graph: csr_matrix, labels: Labels, *, directed: bool) -> float:
    """``graph_connectivity.directed.v1`` or ``graph_connectivity.symmetric.v1``.

    Args:
        graph: (N, N) directed neighbour graph, :meth:`Neighbours.graph` of 14 other cells.
        labels: N labels.
        directed: strongly connected parts, or parts connected by edges taken both ways.

    Raises:
        DataError: lengths differ, or a label is missing.
    """
    codes, names = encode_labels(labels, "cell")
    if graph.shape != (len(codes), len(codes)):
        raise DataError(f"{len(codes)} labels for a graph of shape {graph.shape}; give one each")
    edges = graph.tocoo()
    inside = codes[edges.row] == codes[edges.col]
    own = csr_matrix(
        (np.ones(int(inside.sum())), (edges.row[inside], edges.col[inside])), shape=graph.shape
    )
    connection = "strong" if directed else "weak"
    _, parts = connected_components(own, directed=True, connection=connection)
    sizes = np.bincount(parts)
    largest = np.zeros(len(names))
    np.maximum.at(largest, codes, sizes[parts])
    return float((largest / np.bincount(codes, minlength=len(names))).mean())


def pcr(embedding: npt.ArrayLike, batches: Labels) -> float:
    """``pcr.v1``: the share of the variance that lies between batches, 0 to 1.

    An embedding without variance has 0: there is nothing that a batch could explain.

    Args:
        embedding: (N, D) finite; expression (as principal components) or a model's.
        batches: N batches.

    Raises:
        DataError: the embedding is not finite or not (N, D), lengths differ or a batch is missing.
    """
    points = finite_matrix(embedding)
    codes, names = encode_labels(batches, "batch")
    if len(codes) != len(points):
        raise DataError(f"{len(points)} cells but {len(codes)} batches; give one each")
    points = points - points.mean(axis=0)
    total = float(np.einsum("ij,ij->", points, points))
    between = 0.0
    for batch in range(len(names)):
        cells = points[codes == batch]
        mean = cells.mean(axis=0)
        between += len(cells) * float(mean @ mean)
    return min(1.0, between / total) if total > 0 else 0.0


def pcr_comparison(before: npt.ArrayLike, after: npt.ArrayLike, batches: Labels) -> float:
    """``pcr_comparison.v1``: how much of the batches' share of the variance is gone, 0 at least.

    Args:
        before: (N, D) of the cells without integration, usually principal components.
        after: (N, D') of the same cells in the same order.
        batches: N batches.

    Raises:
        DataError: as in :func:`pcr`, or batches explain no variance before.
    """
    at_first = pcr(before, batches)
    if at_first <= 0:
        raise DataError(
            "batches explain none of the variance before integration: there is nothing to remove; "
            "leave pcr_comparison out"
        )
    return max(0.0, (at_first - pcr(after, batches)) / at_first)
