"""The scores of a whole embedding: integration metrics and probes on the labelled cells."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from cellray.core.errors import DataError
from cellray.metrics.integration import score_integration
from cellray.metrics.probe import probe_embedding, scored_rows
from cellray.tasks._labels import Texts, given

__all__ = ["score_cells"]

F32 = npt.NDArray[np.float32]


def score_cells(
    embedding: F32,
    labels: Texts,
    batches: Texts | None,
    before: F32,
    *,
    seed: int,
) -> dict[str, float]:
    """Integration metrics and probes of an embedding, on its labelled cells.

    Without batches, or with one, the bio part alone. Above 20,000 labelled cells all of it is of a
    stratified subsample, see :func:`cellray.metrics.probe.scored_rows`.

    Args:
        embedding: (N, D), cells in ascending order of their ids.
        labels: N labels; None is not scored.
        batches: N batches, or None if there are none.
        before: (N, P) principal components of the same cells without integration.
        seed: of KMeans and Leiden; folds and subsample have one of their own.

    Raises:
        DataError: lengths differ, no labelled cell, a scored cell without batch, or as in
            :func:`cellray.metrics.integration.score_integration`.
    """
    counts = {"labels": len(labels), "components before integration": len(before)}
    counts |= {} if batches is None else {"batches": len(batches)}
    for what, count in counts.items():
        if count != len(embedding):
            raise DataError(f"{len(embedding)} cells in the embedding but {count} {what}")
    rows = np.flatnonzero(given(labels))
    if not len(rows):
        raise DataError(f"none of the {len(labels)} cells has a label to score the embedding by")
    rows = rows[scored_rows(labels[rows])]
    truth, points = labels[rows], embedding[rows]
    where = np.full(len(rows), "all", dtype=object) if batches is None else batches[rows]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="all cells are of one batch")
        scores = score_integration(points, truth, where, before=before[rows], seed=seed)
    scores["n_scored_cells"] = float(len(rows))
    try:
        scores |= probe_embedding(points, truth)
    except DataError as error:
        warnings.warn(f"the probes are left out: {error}", stacklevel=2)
    return scores
