"""k nearest neighbours on principal components of variable genes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import sparse

from cellray.baselines._features import ComponentConfig, Projection, fit_projection
from cellray.baselines._vote import NUM_NEIGHBORS, neighbour_vote
from cellray.baselines.base import BaselineUnit, Labelled, check_training

__all__ = ["BASELINE", "KnnConfig"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


class KnnConfig(ComponentConfig):
    """Keys of the neighbour vote.

    Attributes:
        num_neighbors: training cells that vote, each with one vote (all of them if there are
            fewer); a tie goes to the class of the nearest among the tied.
    """

    name: str = "knn"
    num_neighbors: int = Field(default=NUM_NEIGHBORS, ge=1)


@dataclass(frozen=True)
class _Knn:
    """A vote among the training cells.

    Shapes:
        reference: (N, P) their components.
        labels: (N,) their codes.
    """

    projection: Projection
    reference: F32
    labels: I64
    num_neighbors: int

    def answer(self, counts: sparse.csr_matrix) -> Labelled:
        embedding = self.embed(counts)
        if counts.shape[0] == 0:
            return Labelled(np.zeros(0, dtype=np.int64), np.zeros(0), embedding)
        codes, share = neighbour_vote(self.reference, self.labels, embedding, self.num_neighbors)
        return Labelled(codes, share, embedding)

    def embed(self, counts: sparse.csr_matrix) -> F32:
        return self.projection.apply(counts)

    def predict(self, counts: sparse.csr_matrix) -> I64:
        return self.answer(counts).codes


def _fit(config: KnnConfig, counts: sparse.csr_matrix, labels: I64, seed: int) -> _Knn:
    check_training(counts, labels)
    projection = fit_projection(counts, config)
    return _Knn(projection, projection.apply(counts), labels, config.num_neighbors)


BASELINE = BaselineUnit(
    name="knn",
    config=KnnConfig,
    fit=_fit,
    seed_scope="",
    title="vote of 15 neighbours on 50 principal components of 2,000 variable genes",
)
