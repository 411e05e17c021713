"""Noise: vectors that know nothing of the cells, the negative control of embeddings."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from cellray.baselines.base import F32, BaselineConfig, BaselineUnit, CellCounts

__all__ = ["BASELINE", "NoiseConfig"]


class NoiseConfig(BaselineConfig):
    """Keys of the noise.

    Attributes:
        width: dimensions.
    """

    name: str = "noise"
    width: int = Field(default=50, ge=1)


def _embed(
    config: NoiseConfig, cells: CellCounts, query: CellCounts | None, seed: int
) -> tuple[F32, F32 | None]:
    """Independent standard normal numbers."""
    random = np.random.default_rng(seed)
    here = random.standard_normal((len(cells), config.width), dtype=np.float32)
    if query is None:
        return here, None
    return here, random.standard_normal((len(query), config.width), dtype=np.float32)


BASELINE = BaselineUnit(
    name="noise",
    config=NoiseConfig,
    seed_scope="the noise",
    title="independent normal numbers: knows nothing, mixes batches perfectly",
    embed=_embed,
    family="control",
    control="negative",
)
