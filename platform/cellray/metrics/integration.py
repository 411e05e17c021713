"""Every integration metric of one embedding, from one neighbour search, and the usual means.

Two families of means, never mixed, each with the metrics it is made of:

- scIB's 0.6 bio + 0.4 batch (10.1038/s41592-021-01336-8) over the metrics that scib-metrics 0.5.10
  takes by default. Bio: NMI and ARI by KMeans, ASW label, isolated ASW, cLISI. Batch: BRAS, iLISI,
  kBET, directed connectivity and, if the embedding before integration is given, PCR comparison;
  without it the ids of batch mean and total are others.
- scGPT's AvgBIO = (NMI + ARI + ASW label) / 3 at the best of the Leiden scan, AvgBATCH = (ASW batch
  + symmetric connectivity) / 2, Overall = 0.6 AvgBIO + 0.4 AvgBATCH (10.1038/s41592-024-02201-0;
  theirs clusters with Louvain).

A random embedding mixes batches perfectly, so a total never stands alone: print bio and batch, and
the controls, beside it.

Small classes: a label of one cell has silhouette width 0 and connectivity 1, and is left out of the
batch silhouettes and kBET; a batch of one cell within a label has width 0, which counts as mixed.

Cells are put in the order of their coordinates first: no number depends on the order given, not
even where distances tie or a seed meets a position.

Legend: N cells, D dimensions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellray.core.errors import DataError
from cellray.metrics.base import Labels, Metric, by_id, encode_labels
from cellray.metrics.clustering import (
    isolated_f1,
    leiden_scan,
    score_best_clustering,
    score_kmeans,
)
from cellray.metrics.graphs import connectivities
from cellray.metrics.kbet import kbet
from cellray.metrics.mixing import (
    clisi,
    graph_connectivity,
    ilisi,
    lisi,
    neighbour_weights,
    pcr,
    pcr_comparison,
)
from cellray.metrics.neighbours import Neighbours, finite_matrix, nearest_neighbours
from cellray.metrics.silhouette import (
    asw_batch,
    asw_label,
    bras,
    isolated_asw,
    silhouette_widths,
)

__all__ = ["METRICS", "MIN_CELLS", "score_integration"]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

# Neighbours of the definitions, the cell itself counted: scib-metrics' 15, 50 and 90.
_GRAPH_K, _KBET_K, _LISI_K = 15, 50, 90
_PERPLEXITY = 30.0
MIN_CELLS = _LISI_K

_BIO = ("nmi.kmeans.v1", "ari.kmeans.v1", "asw_label.v1", "isolated_asw.v1", "clisi.v1")
_BATCH = ("bras.v1", "ilisi.v1", "kbet.diffusion.v1", "graph_connectivity.directed.v1")
_BATCH_PCR = (*_BATCH, "pcr_comparison.v1")
_SCGPT_BIO = ("nmi.leiden_nmi_opt.v1", "ari.leiden_nmi_opt.v1", "asw_label.v1")
_SCGPT_BATCH = ("asw_batch.v1", "graph_connectivity.symmetric.v1")

# mean -> its parts; total -> (bio, batch)
_MEANS: Mapping[str, tuple[str, ...]] = {
    "bio_mean.nmi_ari_asw_isolated_clisi.v1": _BIO,
    "batch_mean.bras_ilisi_kbet_connectivity.v1": _BATCH,
    "batch_mean.bras_ilisi_kbet_connectivity_pcr.v1": _BATCH_PCR,
    "avg_bio.scgpt_leiden.v1": _SCGPT_BIO,
    "avg_batch.scgpt.v1": _SCGPT_BATCH,
}
_TOTALS: Mapping[str, tuple[str, str]] = {
    "total_60_40.bio5_batch4.v1": (
        "bio_mean.nmi_ari_asw_isolated_clisi.v1",
        "batch_mean.bras_ilisi_kbet_connectivity.v1",
    ),
    "total_60_40.bio5_batch5.v1": (
        "bio_mean.nmi_ari_asw_isolated_clisi.v1",
        "batch_mean.bras_ilisi_kbet_connectivity_pcr.v1",
    ),
    "overall.scgpt_leiden.v1": ("avg_bio.scgpt_leiden.v1", "avg_batch.scgpt.v1"),
}

METRICS: Mapping[str, Metric] = by_id(
    *(
        Metric(mean, title, f"mean of {', '.join(_MEANS[mean])}")
        for mean, title in zip(
            _MEANS,
            ("bio", "batch (no PCR)", "batch", "AvgBIO (scGPT)", "AvgBATCH (scGPT)"),
            strict=True,
        )
    ),
    *(
        Metric(total, title, f"0.6 {bio} + 0.4 {batch}")
        for (total, (bio, batch)), title in zip(
            _TOTALS.items(), ("total (no PCR)", "total", "Overall (scGPT)"), strict=True
        )
    ),
)


@dataclass(frozen=True)
class _Case:
    """Cells in canonical order.

    Shapes:
        points: (N, D).
        labels, batches: (N,) codes.
        before: (N, D') or None.
    """

    points: F64
    labels: I64
    batches: I64
    before: F64 | None
    seed: int

    @property
    def num_labels(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def num_batches(self) -> int:
        return int(self.batches.max()) + 1


def _case(
    embedding: npt.ArrayLike,
    labels: Labels,
    batches: Labels,
    before: npt.ArrayLike | None,
    seed: int,
) -> _Case:
    points = finite_matrix(embedding)
    original = None if before is None else finite_matrix(before, "embedding before integration")
    codes, names = encode_labels(labels, "cell")
    in_batch, _ = encode_labels(batches, "batch")
    counts = {"labels": len(codes), "batches": len(in_batch)}
    if original is not None:
        counts["cells before integration"] = len(original)
    for what, count in counts.items():
        if count != len(points):
            raise DataError(
                f"{len(points)} cells in the embedding but {count} {what}; give one each"
            )
    if len(points) < MIN_CELLS:
        raise DataError(
            f"{len(points)} cells; LISI looks at {_LISI_K} of them around each, so give at least "
            f"{MIN_CELLS}"
        )
    if len(names) < 2:
        raise DataError(f"all cells have the label '{names[0]}'; bio metrics need at least two")
    keys = [] if original is None else list(original.T[::-1])
    order = np.lexsort((*keys, in_batch, codes, *points.T[::-1]))
    return _Case(
        points=points[order],
        labels=codes[order],
        batches=in_batch[order],
        before=None if original is None else original[order],
        seed=seed,
    )


def _bio_scores(case: _Case, neighbours: Neighbours, weights: F64) -> dict[str, float]:
    widths = silhouette_widths(case.points, case.labels)
    clusterings = leiden_scan(connectivities(neighbours.first(_GRAPH_K - 1)), seed=case.seed)
    return {
        **score_kmeans(case.points, case.labels, seed=case.seed),
        **score_best_clustering(clusterings, case.labels),
        "asw_label.v1": asw_label(widths),
        "isolated_asw.v1": isolated_asw(widths, case.labels, case.batches),
        "isolated_f1.leiden.v1": isolated_f1(clusterings, case.labels, case.batches),
        "clisi.v1": clisi(lisi(neighbours, weights, case.labels), case.num_labels),
    }


def _connectivity_scores(case: _Case, neighbours: Neighbours) -> dict[str, float]:
    graph = neighbours.first(_GRAPH_K - 1).graph()
    return {
        f"graph_connectivity.{name}.v1": graph_connectivity(graph, case.labels, directed=directed)
        for name, directed in (("directed", True), ("symmetric", False))
    }


def _batch_scores(case: _Case, neighbours: Neighbours, weights: F64) -> dict[str, float]:
    scores = {
        "ilisi.v1": ilisi(lisi(neighbours, weights, case.batches), case.num_batches),
        "pcr.v1": pcr(case.points, case.batches),
    }
    around = neighbours.first(_KBET_K - 1)
    before = case.before
    judges: dict[str, Callable[[], float]] = {
        "asw_batch.v1": lambda: asw_batch(case.points, case.labels, case.batches),
        "bras.v1": lambda: bras(case.points, case.labels, case.batches),
        "kbet.diffusion.v1": lambda: kbet(connectivities(around), case.labels, case.batches),
    }
    if before is not None:
        judges["pcr_comparison.v1"] = lambda: pcr_comparison(before, case.points, case.batches)
    for name, judge in judges.items():
        try:
            scores[name] = judge()
        except DataError as error:  # the inputs are sound: this metric has nothing to judge here
            warnings.warn(f"{name} is left out, and every mean with it: {error}", stacklevel=3)
    return scores


def _with_means(scores: dict[str, float], *, with_before: bool) -> dict[str, float]:
    """Add each mean whose parts are all there, and each total whose means are."""
    found = dict(scores)
    for mean, parts in _MEANS.items():
        if parts == (_BATCH if with_before else _BATCH_PCR):
            continue
        if all(part in found for part in parts):
            found[mean] = float(np.mean([found[part] for part in parts]))
    for total, (bio, batch) in _TOTALS.items():
        if bio in found and batch in found:
            found[total] = 0.6 * found[bio] + 0.4 * found[batch]
    return found


def score_integration(
    embedding: npt.ArrayLike,
    labels: Labels,
    batches: Labels,
    *,
    before: npt.ArrayLike | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """All integration metrics of an embedding, by versioned id.

    With one batch the batch metrics and all totals are left out, with a warning; so is, with
    whatever mean it belongs to, a batch metric that has nothing to judge (every label in one batch,
    every label under 10 cells, batches that explained nothing before). Graph connectivity is
    about labels and stays.

    Args:
        embedding: (N, D) finite; N at least :data:`MIN_CELLS`.
        labels: N cell-type labels, of two kinds at least.
        batches: N batches.
        before: (N, D') the same cells in the same order without integration, as principal
            components; needed for PCR comparison only.
        seed: of KMeans and Leiden.

    Returns:
        id -> value.

    Raises:
        DataError: an embedding is not (N, D) or holds NaN, lengths differ, a label or batch is
            missing, too few cells, or one label only.
    """
    case = _case(embedding, labels, batches, before, seed)
    neighbours = nearest_neighbours(case.points, _LISI_K - 1)
    weights = neighbour_weights(neighbours, perplexity=_PERPLEXITY)
    scores = _bio_scores(case, neighbours, weights)
    scores |= _connectivity_scores(case, neighbours)
    if case.num_batches > 1:
        scores |= _batch_scores(case, neighbours, weights)
    else:
        warnings.warn(
            "all cells are of one batch: batch metrics and totals are left out", stacklevel=2
        )
    return _with_means(scores, with_before=before is not None)
