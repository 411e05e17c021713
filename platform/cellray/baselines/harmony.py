"""Harmony (Korsunsky et al. 2019, doi:10.1038/s41592-019-0619-0) on principal components.

The package harmonypy, which is under GPL-3, is an extra of its own: it is called
here, and nothing of it is copied.
"""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
from pydantic import Field

from cellray.baselines._features import one_thread
from cellray.baselines._joint import batch_names, joined, parted
from cellray.baselines.base import F32, BaselineUnit, CellCounts
from cellray.baselines.pca import PcaConfig, principal_components

__all__ = ["BASELINE", "HarmonyConfig"]


class HarmonyConfig(PcaConfig):
    """Keys of the correction.

    Attributes:
        max_iterations: rounds of clustering and correction at most.
    """

    name: str = "harmony"
    max_iterations: int = Field(default=10, ge=1)


def _embed(
    config: HarmonyConfig, cells: CellCounts, query: CellCounts | None, seed: int
) -> tuple[F32, F32 | None]:
    """Components fitted on ``cells``; the correction sees both, and no label."""
    import harmonypy

    names = batch_names(joined(cells, query), config.name)
    here, further = principal_components(config, cells, query)
    points = here if further is None else np.concatenate([here, further])
    logging.getLogger("harmonypy").setLevel(logging.WARNING)
    with one_thread():
        found = harmonypy.run_harmony(
            points.astype(np.float64),
            pd.DataFrame({"batch": names}),
            "batch",
            max_iter_harmony=config.max_iterations,
            random_state=seed,
            verbose=False,
            ncores=1,
        )
    corrected = np.asarray(found.Z_corr, dtype=np.float32)
    if corrected.shape != points.shape:  # versions differ in which way round it lies
        corrected = corrected.T
    return parted(np.ascontiguousarray(corrected), len(cells), query)


BASELINE = BaselineUnit(
    name="harmony",
    config=HarmonyConfig,
    seed_scope="clustering of Harmony",
    title="Harmony on 50 principal components",
    embed=_embed,
    transductive=True,
    needs_batches=True,
    requires=("harmonypy",),
    extra="harmony",
)
