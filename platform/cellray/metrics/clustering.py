"""Do clusters of the embedding agree with the labels? NMI, ARI and the F1 of isolated labels.

The clustering is part of the definition, and of the id:

- ``kmeans``: KMeans with as many clusters as labels, the convention of scib-metrics.
- ``leiden_nmi_opt``: Leiden on the 15-neighbour graph at resolutions 0.1, 0.2 ... 2.0; the one with
  the best NMI *against the labels* is kept, and ARI is read there. That is an oracle's choice, made
  by scGPT (10.1038/s41592-024-02201-0; there with Louvain) and scIB (10.1038/s41592-021-01336-8):
  fair only where every method of a table gets it.

NMI is divided by the arithmetic mean of the entropies; ARI is Hubert and Arabie's
(10.1007/BF01908075). Legend: N cells, L labels, R resolutions.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from cellray.core.errors import DataError
from cellray.metrics.base import Labels, Metric, by_id, encode_labels
from cellray.metrics.graphs import leiden
from cellray.metrics.neighbours import finite_matrix

__all__ = [
    "METRICS",
    "RESOLUTIONS",
    "agreement",
    "isolated_f1",
    "isolated_labels",
    "kmeans_clusters",
    "leiden_scan",
    "score_best_clustering",
    "score_kmeans",
]

I64 = npt.NDArray[np.int64]

RESOLUTIONS = tuple(round(0.1 * step, 1) for step in range(1, 21))
_STARTS = 10  # of KMeans, the best of which is kept

METRICS: Mapping[str, Metric] = by_id(
    Metric("nmi.kmeans.v1", "NMI (KMeans)", "NMI of labels and KMeans(k = labels), arithmetic"),
    Metric("ari.kmeans.v1", "ARI (KMeans)", "ARI of labels and KMeans(k = labels)"),
    Metric(
        "nmi.leiden_nmi_opt.v1",
        "NMI (Leiden, oracle)",
        "best NMI over Leiden resolutions 0.1 to 2.0, chosen with the labels",
    ),
    Metric(
        "ari.leiden_nmi_opt.v1",
        "ARI (Leiden, oracle)",
        "ARI at the Leiden resolution of the best NMI, chosen with the labels",
    ),
    Metric(
        "isolated_f1.leiden.v1",
        "isolated F1",
        "best F1 over all Leiden clusters for each label in the fewest batches, mean over them",
    ),
)


def agreement(labels: Labels, clusters: npt.ArrayLike) -> tuple[float, float]:
    """NMI (arithmetic) and ARI of labels and clusters.

    Args:
        labels: N labels.
        clusters: (N,) whole numbers.

    Raises:
        DataError: lengths differ, or a label is missing.
    """
    codes, _ = encode_labels(labels, "cell")
    found = np.asarray(clusters)
    if found.shape != codes.shape:
        raise DataError(f"{len(codes)} labels but clusters of shape {found.shape}; give one each")
    nmi = normalized_mutual_info_score(codes, found, average_method="arithmetic")
    return float(nmi), float(adjusted_rand_score(codes, found))


def kmeans_clusters(embedding: npt.ArrayLike, num_clusters: int, *, seed: int = 0) -> I64:
    """Clusters of KMeans, the best of ten seeded starts.

    An embedding with fewer distinct cells than clusters gets as many clusters as it has cells that
    differ, without a warning: that is the embedding's result.

    Args:
        embedding: (N, D) finite.
        num_clusters: 1 to N.
        seed: of the starts.

    Raises:
        DataError: the embedding is not finite or not (N, D), or num_clusters is outside 1..N.
    """
    points = finite_matrix(embedding)
    if not 1 <= num_clusters <= len(points):
        raise DataError(f"{num_clusters} clusters of {len(points)} cells; give 1 to {len(points)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = KMeans(num_clusters, n_init=_STARTS, random_state=seed).fit(points)
    return np.asarray(model.labels_, dtype=np.int64)


def score_kmeans(embedding: npt.ArrayLike, labels: Labels, *, seed: int = 0) -> dict[str, float]:
    """``nmi.kmeans.v1`` and ``ari.kmeans.v1``.

    Args:
        embedding: (N, D) finite.
        labels: N labels.
        seed: of KMeans.

    Raises:
        DataError: as in :func:`agreement` and :func:`kmeans_clusters`.
    """
    codes, names = encode_labels(labels, "cell")
    nmi, ari = agreement(codes, kmeans_clusters(embedding, len(names), seed=seed))
    return {"nmi.kmeans.v1": nmi, "ari.kmeans.v1": ari}


def leiden_scan(
    graph: csr_matrix, *, resolutions: Sequence[float] = RESOLUTIONS, seed: int = 0
) -> I64:
    """Leiden communities at every resolution.

    Args:
        graph: (N, N) symmetric weights.
        resolutions: R numbers above 0.
        seed: the same at every resolution.

    Returns:
        (R, N) int64.

    Raises:
        DataError: no resolution is given, or one is not above 0.
    """
    if not len(resolutions):
        raise DataError("no resolution to cluster at; give at least one number above 0")
    return np.stack([leiden(graph, resolution, seed=seed) for resolution in resolutions])


def score_best_clustering(clusterings: I64, labels: Labels) -> dict[str, float]:
    """``nmi.leiden_nmi_opt.v1`` and ``ari.leiden_nmi_opt.v1``.

    Args:
        clusterings: (R, N) from :func:`leiden_scan`; of equal NMI the first is taken.
        labels: N labels.

    Raises:
        DataError: as in :func:`agreement`.
    """
    codes, _ = encode_labels(labels, "cell")
    scores = [agreement(codes, clusters) for clusters in clusterings]
    nmi, ari = scores[int(np.argmax([nmi for nmi, _ in scores]))]
    return {"nmi.leiden_nmi_opt.v1": nmi, "ari.leiden_nmi_opt.v1": ari}


def isolated_labels(labels: Labels, batches: Labels) -> I64:
    """The labels that are in the fewest batches (scIB), as positions in the sorted names.

    Where every label is in every batch, all of them are.

    Args:
        labels: N labels.
        batches: N batches.

    Raises:
        DataError: lengths differ, or a label or batch is missing.
    """
    codes, names = encode_labels(labels, "cell")
    in_batch, batch_names = encode_labels(batches, "batch")
    if len(codes) != len(in_batch):
        raise DataError(f"{len(codes)} cell labels but {len(in_batch)} batches; give one each")
    seen = np.zeros((len(names), len(batch_names)), dtype=bool)
    seen[codes, in_batch] = True
    num_batches = seen.sum(axis=1)
    return np.flatnonzero(num_batches == num_batches.min()).astype(np.int64)


def isolated_f1(clusterings: I64, labels: Labels, batches: Labels) -> float:
    """``isolated_f1.leiden.v1``: how well one cluster holds an isolated label, and nothing else.

    For each isolated label the best F1 = 2 n_lc / (n_l + n_c) over the clusters c of all
    resolutions; then the mean over isolated labels (scIB, 10.1038/s41592-021-01336-8).

    Args:
        clusterings: (R, N) from :func:`leiden_scan`.
        labels: N labels.
        batches: N batches.

    Raises:
        DataError: as in :func:`isolated_labels`, or the clusterings are of other cells.
    """
    codes, names = encode_labels(labels, "cell")
    isolated = isolated_labels(labels, batches)
    if clusterings.ndim != 2 or clusterings.shape[1] != len(codes):
        raise DataError(
            f"clusterings of shape {clusterings.shape} for {len(codes)} cells; give "
            "(resolutions, cells)"
        )
    best = np.zeros(len(isolated))
    for clusters in clusterings:
        width = int(clusters.max()) + 1
        table = np.bincount(codes * width + clusters, minlength=len(names) * width)
        table = table.reshape(len(names), width)
        f1 = 2.0 * table / (table.sum(axis=1, keepdims=True) + table.sum(axis=0)[None, :])
        best = np.maximum(best, f1[isolated].max(axis=1))
    return float(best.mean())
