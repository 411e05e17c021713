"""The log-normalised variable genes themselves as the embedding.

The row that beat foundation models without fine-tuning in Kedzierska et al. 2025
(doi:10.1186/s13059-025-03574-x).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import sparse

from cellray.baselines._features import FeatureConfig, fit_genes, for_both
from cellray.baselines.base import BaselineUnit, CellCounts

__all__ = ["BASELINE", "HvgConfig"]

F32 = npt.NDArray[np.float32]


class HvgConfig(FeatureConfig):
    """The keys of the genes."""

    name: str = "hvg"


def _embed(
    config: HvgConfig, cells: CellCounts, query: CellCounts | None, seed: int
) -> tuple[F32, F32 | None]:
    genes = fit_genes(cells.counts, config, cells.batches)

    def dense(counts: sparse.csr_matrix) -> F32:
        return np.asarray(genes.apply(counts).toarray(), dtype=np.float32)

    return for_both(dense, cells, query)


BASELINE = BaselineUnit(
    name="hvg",
    config=HvgConfig,
    embed=_embed,
    answers=("labels", "embedding"),
    seed_scope="",
    title="2,000 log-normalised variable genes as they are",
    revision=2,  # genes that vary within batches
)
