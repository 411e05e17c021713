"""k nearest neighbours on principal components of variable genes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import sparse
from sklearn.neighbors import NearestNeighbors

from cellray.baselines._features import (
    Components,
    FeatureConfig,
    GeneFeatures,
    fit_components,
    fit_genes,
)
from cellray.baselines.base import NUM_NEIGHBORS, BaselineUnit, Labelled, check_training
from cellray.core.voting import vote

__all__ = ["BASELINE", "KnnConfig"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


class KnnConfig(FeatureConfig):
    """Keys of the neighbour vote.

    Attributes:
        num_neighbors: training cells that vote, each with one vote (all of them if there are
            fewer); a tie goes to the class of the nearest among the tied.
        num_components: principal components.
    """

    name: str = "knn"
    num_neighbors: int = Field(default=NUM_NEIGHBORS, ge=1)
    num_components: int = Field(default=50, ge=1)


@dataclass(frozen=True)
class _Knn:
    """Shapes: ``labels`` (N,) codes of the indexed training cells."""

    genes: GeneFeatures
    components: Components
    index: Any
    labels: I64

    def embed(self, counts: sparse.csr_matrix) -> F32:
        return self.components.apply(self.genes.apply(counts))

    def label(self, counts: sparse.csr_matrix) -> Labelled:
        asked = self.embed(counts)
        if counts.shape[0] == 0:
            return Labelled(np.zeros(0, dtype=np.int64), np.zeros(0), asked)
        neighbours = self.index.kneighbors(asked, return_distance=False)
        return Labelled(*vote(self.labels[neighbours]), asked)


def _fit(config: KnnConfig, counts: sparse.csr_matrix, labels: I64, seed: int) -> _Knn:
    check_training(counts, labels)
    genes = fit_genes(counts, config)
    scaled = genes.apply(counts)
    components = fit_components(scaled, config.num_components)
    k = min(config.num_neighbors, counts.shape[0])
    index = NearestNeighbors(n_neighbors=k).fit(components.apply(scaled))
    return _Knn(genes, components, index, labels)


BASELINE = BaselineUnit(
    name="knn",
    config=KnnConfig,
    fit=_fit,
    seed_scope="",
    title="vote of 15 neighbours on 50 principal components of 2,000 variable genes",
)
