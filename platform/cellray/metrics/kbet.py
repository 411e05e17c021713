"""kBET: are the batches around a cell those of its label at large? By a chi-square test.

A cell accepts if the batches of its k neighbours agree with the batch frequencies of its label
(Buettner 2019, 10.1038/s41592-018-0254-1). scIB (10.1038/s41592-021-01336-8) tests within labels
and averages their acceptance rates; scib-metrics 0.5 searches the neighbours in a diffusion map of
the label's part of the 50-neighbour graph. That is ``kbet.diffusion.v1``:

1. k = a quarter of the mean batch size of the label, 10 at least and 70 at most; the cell itself
   counts with them. A label of fewer than 10 cells or one batch is left out.
2. If its graph falls apart, parts below 3 k cells are left out; if they hold more than a quarter of
   the label, it scores 0.
3. Diffusion map (Coifman 2005, 10.1073/pnas.0500334102; Haghverdi 2016, 10.1038/nmeth.3971): up to
   100 eigenvectors of the density-normalised transition matrix with the largest absolute
   eigenvalues e, times e / (1 - e), and times 1 where e = 1.
4. Chi-square with (batches - 1) degrees of freedom; a cell accepts at p >= 0.05.

Two departures from scib-metrics, both for exactness: neighbours in the map are searched exactly,
and the number of eigenvectors does not shrink for labels that come after a small one.

Legend: N cells of a label, B batches, K neighbours, E eigenvectors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy import linalg, sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh
from scipy.special import chdtrc

from cellray.core.errors import DataError
from cellray.metrics.base import Labels, Metric, by_id, encode_labels
from cellray.metrics.neighbours import nearest_neighbours

__all__ = ["METRICS", "acceptance_rate", "diffusion_map", "kbet", "kbet_by_label"]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

METRICS: Mapping[str, Metric] = by_id(
    Metric(
        "kbet.diffusion.v1",
        "kBET",
        "share of cells whose neighbours have the batches of their label, mean over labels",
    ),
)

_ALPHA = 0.05
_COMPONENTS = 100
_DENSE_CELLS = 600  # up to here a full decomposition is as quick
_NEAR_ONE = 3e-8  # half a step of float32 below 1, where scib-metrics takes e for 1


def acceptance_rate(indices: I64, batches: I64) -> float:
    """Share of cells whose neighbours' batches pass the chi-square test.

    Args:
        indices: (N, K) neighbours, the cell itself among them.
        batches: (N,) codes 0..B-1, each of which occurs.

    Returns:
        0 to 1; 0 for a single batch, which cannot be tested.
    """
    frequency = np.bincount(batches) / len(batches)
    num_batches = len(frequency)
    if num_batches < 2:
        return 0.0
    flat = batches[indices] + num_batches * np.arange(len(indices))[:, None]
    counts = np.bincount(flat.ravel(), minlength=len(indices) * num_batches)
    expected = frequency * indices.shape[1]
    statistic = ((counts.reshape(-1, num_batches) - expected) ** 2 / expected).sum(axis=1)
    return float((chdtrc(num_batches - 1, statistic) >= _ALPHA).mean())


def diffusion_map(graph: sparse.csr_matrix, num_components: int = _COMPONENTS) -> F64:
    """Coordinates in which Euclidean distance is diffusion distance over all times.

    Args:
        graph: (N, N) symmetric weights, every cell with an edge.
        num_components: E, cut to N - 1.

    Returns:
        (N, E) float64; its axes are arbitrary up to rotation, its distances are not.
    """
    density = np.asarray(graph.sum(axis=0)).ravel()
    scaled = sparse.diags(1.0 / density) @ graph @ sparse.diags(1.0 / density)
    root = np.sqrt(np.asarray(scaled.sum(axis=0)).ravel())
    transitions = (sparse.diags(1.0 / root) @ scaled @ sparse.diags(1.0 / root)).tocsr()
    count = min(num_components, graph.shape[0] - 1)
    if graph.shape[0] <= _DENSE_CELLS:
        values, vectors = linalg.eigh(transitions.toarray())
        largest = np.argsort(-np.abs(values), kind="stable")[:count]
        values, vectors = values[largest], vectors[:, largest]
    else:
        start = np.random.default_rng(0).standard_normal(graph.shape[0])
        values, vectors = eigsh(transitions, k=count, which="LM", v0=start)
    at_one = np.abs(values - 1.0) <= _NEAR_ONE
    gains = np.where(at_one, 1.0, values / np.where(at_one, 1.0, 1.0 - values))
    return np.asarray(vectors * gains, dtype=np.float64)


def _label_score(graph: sparse.csr_matrix, batches: I64) -> float:
    """The score of one label; NaN if it cannot be judged."""
    num_cells, num_batches = len(batches), len(np.unique(batches))
    if num_cells < 10 or num_batches == 1:
        return float("nan")
    k = int(np.clip(num_cells / num_batches // 4, 10, 70))
    _, parts = connected_components(graph, directed=False)
    sizes = np.bincount(parts)
    if len(sizes) > 1:
        kept = np.flatnonzero(sizes[parts] >= 3 * k)
        if len(kept) < 0.75 * num_cells:
            return 0.0
        graph, batches = graph[kept][:, kept], batches[kept]
    codes = np.unique(batches, return_inverse=True)[1]
    found = nearest_neighbours(diffusion_map(graph), min(k, len(codes) - 1))
    return acceptance_rate(found.with_self().indices, codes.astype(np.int64))


def kbet_by_label(graph: sparse.csr_matrix, labels: Labels, batches: Labels) -> dict[str, float]:
    """The acceptance rate of every label, NaN where a label cannot be judged.

    Args:
        graph: (N, N) symmetric weights of the 50-neighbour graph (49 other cells), from
            :func:`cellray.metrics.graphs.connectivities`.
        labels: N labels.
        batches: N batches.

    Raises:
        DataError: lengths differ, or a label or batch is missing.
    """
    codes, names = encode_labels(labels, "cell")
    in_batch, _ = encode_labels(batches, "batch")
    if not graph.shape[0] == len(codes) == len(in_batch):
        raise DataError(
            f"{len(codes)} labels and {len(in_batch)} batches for a graph of {graph.shape[0]} "
            "cells; give one each"
        )
    scores = {}
    for code, name in enumerate(names):
        cells = np.flatnonzero(codes == code)
        scores[name] = _label_score(graph[cells][:, cells], in_batch[cells])
    return scores


def kbet(graph: sparse.csr_matrix, labels: Labels, batches: Labels) -> float:
    """``kbet.diffusion.v1``: mean acceptance rate over the labels that can be judged.

    Args:
        graph: as in :func:`kbet_by_label`.
        labels: N labels.
        batches: N batches.

    Raises:
        DataError: as in :func:`kbet_by_label`, or no label can be judged.
    """
    scores = np.array(list(kbet_by_label(graph, labels, batches).values()))
    if np.isnan(scores).all():
        raise DataError("kBET can judge no label: each has fewer than 10 cells or a single batch")
    return float(np.nanmean(scores))
