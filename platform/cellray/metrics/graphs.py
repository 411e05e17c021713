"""Weighted neighbour graphs and their Leiden communities. igraph enters here and nowhere else.

The weights are UMAP's fuzzy simplicial set (McInnes, Healy, Melville 2018, arXiv:1802.03426,
algorithms 2 and 3), which scanpy clusters on: with r_i the distance to the nearest neighbour that
is not a duplicate, the directed weight of neighbour j is exp(-max(0, d_ij - r_i) / s_i), s_i such
that the weights of a cell sum to log2(k), k counting the cell itself; and both directions are
joined as a + b - a b.

Leiden: Traag, Waltman, van Eck 2019, 10.1038/s41598-019-41695-z.

Legend: N cells, K neighbours without the cell itself.
"""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
from scipy import sparse

from cellray.core.errors import DataError
from cellray.metrics.neighbours import Neighbours

__all__ = ["connectivities", "leiden"]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_HALVINGS = 64
_SMALLEST_SCALE = 1e-3  # of the mean distance; keeps cells among duplicates from a scale of 0


def _scales(distances: F64, nearest: F64) -> F64:
    """s_i by bisection, all cells at once: the sum of weights grows with s_i: (N,)."""
    beyond = np.maximum(0.0, distances - nearest[:, None])
    target = np.log2(distances.shape[1] + 1)
    low, high = np.zeros(len(distances)), np.full(len(distances), np.inf)
    scale = np.ones(len(distances))
    for _ in range(_HALVINGS):
        total = np.exp(-beyond / scale[:, None]).sum(axis=1)
        above = total > target
        high = np.where(above, scale, high)
        low = np.where(above, low, scale)
        middle = np.where(np.isinf(high), scale * 2.0, (low + high) / 2.0)
        scale = np.maximum(middle, np.finfo(np.float64).tiny)
    cells = distances.sum(axis=1) / (distances.shape[1] + 1)  # the cell itself is at distance 0
    floor = _SMALLEST_SCALE * np.where(nearest > 0, cells, cells.mean())
    bounded: F64 = np.maximum(scale, floor)
    return bounded


def connectivities(neighbours: Neighbours) -> sparse.csr_matrix:
    """Symmetric weights in 0..1 of the neighbour graph, as scanpy and scib-metrics have them.

    Args:
        neighbours: K nearest other cells of N cells; the k of the definition is K + 1.

    Returns:
        (N, N), without a diagonal.

    Raises:
        DataError: there are no neighbours.
    """
    if not neighbours.k:
        raise DataError("a graph needs at least one neighbour of each cell, 0 were given")
    distances = neighbours.distances
    apart = np.where(distances > 0, distances, np.inf).min(axis=1)
    nearest = np.where(np.isfinite(apart), apart, 0.0)
    beyond = np.maximum(0.0, distances - nearest[:, None])
    scale = _scales(distances, nearest)[:, None]
    weights = np.where(beyond > 0, np.exp(-beyond / np.where(scale > 0, scale, 1.0)), 1.0)
    graph = neighbours.graph()
    graph.data = weights.ravel()
    back = graph.T.tocsr()
    joined = (graph + back - graph.multiply(back)).tocsr()
    joined.eliminate_zeros()
    joined.sort_indices()
    return joined


def leiden(graph: sparse.csr_matrix, resolution: float, *, seed: int = 0) -> I64:
    """Communities of an undirected weighted graph: modularity, two iterations, seeded.

    Args:
        graph: (N, N) symmetric non-negative weights.
        resolution: above 0; more is more communities.
        seed: of igraph's random numbers.

    Returns:
        (N,) int64 community of each cell.

    Raises:
        DataError: the resolution is not above 0.
    """
    import igraph  # here: looking up a metric's id must not load a compiled library

    if not resolution > 0:
        raise DataError(f"the resolution is {resolution}; give a number above 0")
    upper = sparse.triu(graph, k=1).tocoo()
    edges = np.stack([upper.row, upper.col], axis=1)
    network = igraph.Graph(n=graph.shape[0], edges=edges)
    igraph.set_random_number_generator(random.Random(seed))
    try:
        found = network.community_leiden(
            objective_function="modularity",
            weights=upper.data.tolist(),
            resolution=resolution,
            n_iterations=2,
        )
    finally:
        igraph.set_random_number_generator(random)
    return np.asarray(found.membership, dtype=np.int64)
