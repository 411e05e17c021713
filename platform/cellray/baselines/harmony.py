"""Harmony on principal components (Korsunsky et al. 2019, doi:10.1038/s41592-019-0619-0).

The package harmonypy does the work; it is GPL-3.0, called as it is, and only if the extra is
installed. Genes and components come from the cells fitted on. The correction itself has no form for
new cells, so query cells take part in it: with their counts and batches, never with labels.

Legend: N cells fitted on, Q query cells, P components.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cellray.baselines._features import ComponentConfig, fit_projection, for_both
from cellray.baselines.base import BaselineUnit, CellCounts

__all__ = ["BASELINE", "HarmonyConfig"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

_CELLS_PER_CLUSTER = 30.0
_MAX_CLUSTERS = 100.0
_SEEDS = 1 << 31  # the package takes no larger one


class HarmonyConfig(ComponentConfig):
    """Keys of the correction; the defaults are the package's.

    Attributes:
        theta: how much clusters of mixed batches are preferred; 0 is not at all.
        max_iterations: rounds of clustering and correction.
    """

    name: str = "harmony"
    theta: float = Field(default=2.0, ge=0)
    max_iterations: int = Field(default=10, ge=1)


def _correct(config: HarmonyConfig, components: F32, batches: I64, seed: int) -> F32:
    """(N + Q, P) components -> the same, batches mixed; the number of threads changes nothing."""
    import harmonypy

    num = len(components)
    done = harmonypy.run_harmony(
        components,
        {"batch": batches},
        ["batch"],
        theta=config.theta,
        max_iter_harmony=config.max_iterations,
        nclust=int(min(max(round(num / _CELLS_PER_CLUSTER), 1.0), _MAX_CLUSTERS)),
        verbose=False,
        random_state=seed % _SEEDS,
        ncores=1,
    )
    return np.asarray(done.Z_corr, dtype=np.float32)


def _embed(
    config: HarmonyConfig, cells: CellCounts, query: CellCounts | None, seed: int
) -> tuple[F32, F32 | None]:
    first, second = for_both(
        fit_projection(cells.counts, config, cells.batches).apply, cells, query
    )
    assert cells.batches is not None
    components, batches = first, cells.batches
    if query is not None and second is not None:
        assert query.batches is not None
        components = np.concatenate([first, second])
        batches = np.concatenate([batches, query.batches])
    corrected = _correct(config, components, batches, seed)
    return corrected[: len(first)], None if second is None else corrected[len(first) :]


BASELINE = BaselineUnit(
    name="harmony",
    config=HarmonyConfig,
    embed=_embed,
    answers=("labels", "embedding"),
    transductive=True,
    needs_batches=True,
    requires=("harmonypy",),
    extra="harmony",
    seed_scope="clustering",
    title="Harmony on 50 principal components of 2,000 variable genes",
    revision=2,  # genes that vary within batches
)
