"""The variable genes themselves as an embedding: no model, no components."""

from __future__ import annotations

import numpy as np

from cellray.baselines._features import FeatureConfig, fit_genes
from cellray.baselines.base import F32, BaselineUnit, CellCounts

__all__ = ["BASELINE", "HvgConfig"]


class HvgConfig(FeatureConfig):
    """Keys of the choice of genes."""

    name: str = "hvg"


def _embed(
    config: HvgConfig, cells: CellCounts, query: CellCounts | None, seed: int
) -> tuple[F32, F32 | None]:
    """Log-normalised values of the genes chosen and scaled on ``cells``, dense (N, K)."""
    genes = fit_genes(cells.counts, config)
    here = genes.apply(cells.counts).toarray().astype(np.float32)
    further = None if query is None else genes.apply(query.counts).toarray().astype(np.float32)
    return here, further


BASELINE = BaselineUnit(
    name="hvg",
    config=HvgConfig,
    seed_scope="",
    title="2,000 variable genes, log-normalised and scaled",
    embed=_embed,
)
