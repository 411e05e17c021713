"""A random projection of log-normalised variable genes: what width alone is worth.

Johnson-Lindenstrauss: distances are kept up to noise, nothing is learnt (Achlioptas 2003,
doi:10.1016/S0022-0000(03)00025-4).

Legend: K genes, D dimensions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import sparse

from cellray.baselines._features import FeatureConfig, fit_genes, for_both
from cellray.baselines.base import BaselineUnit, CellCounts

__all__ = ["BASELINE", "RandomProjectionConfig"]

F32 = npt.NDArray[np.float32]


class RandomProjectionConfig(FeatureConfig):
    """Keys of the projection.

    Attributes:
        num_dimensions: D.
    """

    name: str = "random_projection"
    num_dimensions: int = Field(default=50, ge=1)


def _embed(
    config: RandomProjectionConfig, cells: CellCounts, query: CellCounts | None, seed: int
) -> tuple[F32, F32 | None]:
    genes = fit_genes(cells.counts, config, cells.batches)
    shape = (len(genes.genes), config.num_dimensions)
    axes = np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[1])

    def project(counts: sparse.csr_matrix) -> F32:
        return np.asarray(genes.apply(counts) @ axes, dtype=np.float32)

    return for_both(project, cells, query)


BASELINE = BaselineUnit(
    name="random_projection",
    config=RandomProjectionConfig,
    embed=_embed,
    answers=("labels", "embedding"),
    seed_scope="projection",
    title="50 random Gaussian directions of 2,000 variable genes",
    revision=2,  # genes that vary within batches
)
