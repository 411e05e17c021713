"""Principal components of log-normalised variable genes: no integration, no learning."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cellray.baselines._features import ComponentConfig, fit_projection, for_both
from cellray.baselines.base import BaselineUnit, CellCounts

__all__ = ["BASELINE", "PcaConfig"]

F32 = npt.NDArray[np.float32]


class PcaConfig(ComponentConfig):
    """The keys of the genes and of the components."""

    name: str = "pca"


def _embed(
    config: PcaConfig, cells: CellCounts, query: CellCounts | None, seed: int
) -> tuple[F32, F32 | None]:
    return for_both(fit_projection(cells.counts, config, cells.batches).apply, cells, query)


BASELINE = BaselineUnit(
    name="pca",
    config=PcaConfig,
    embed=_embed,
    answers=("labels", "embedding"),
    seed_scope="",
    title="50 exact principal components of 2,000 variable genes, no integration",
    revision=2,  # genes that vary within batches
)
