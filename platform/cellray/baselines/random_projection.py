"""Variable genes projected at random: as many dimensions as components, none of them learnt."""

from __future__ import annotations

import numpy as np

from cellray.baselines._features import fit_genes
from cellray.baselines.base import F32, BaselineUnit, CellCounts
from cellray.baselines.pca import PcaConfig

__all__ = ["BASELINE", "ProjectionConfig"]


class ProjectionConfig(PcaConfig):
    """Keys of the projection: genes, and ``num_components`` dimensions."""

    name: str = "random_projection"


def _embed(
    config: ProjectionConfig, cells: CellCounts, query: CellCounts | None, seed: int
) -> tuple[F32, F32 | None]:
    """Scaled genes times a matrix of normal numbers that only the seed decides."""
    genes = fit_genes(cells.counts, config)
    scaled = genes.apply(cells.counts)
    width = config.num_components
    matrix = np.random.default_rng(seed).standard_normal((scaled.shape[1], width))
    matrix /= np.sqrt(width)
    further = None
    if query is not None:
        further = np.asarray(genes.apply(query.counts) @ matrix, dtype=np.float32)
    return np.asarray(scaled @ matrix, dtype=np.float32), further


BASELINE = BaselineUnit(
    name="random_projection",
    config=ProjectionConfig,
    seed_scope="the projection",
    title="50 random projections of 2,000 variable genes",
    embed=_embed,
)
