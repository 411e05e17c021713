"""Negative control of an embedding: Gaussian noise that knows nothing of a cell.

It mixes batches perfectly and keeps no biology, which is why no total stands alone. A cell's noise
is a function of its counts and the seed, so that it does not depend on the other cells.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cellray.baselines._chance import normals
from cellray.baselines._features import for_both
from cellray.baselines.base import BaselineConfig, BaselineUnit, CellCounts

__all__ = ["BASELINE", "NoiseConfig"]

F32 = npt.NDArray[np.float32]


class NoiseConfig(BaselineConfig):
    """Keys of the noise.

    Attributes:
        num_dimensions: D, each N(0, 1).
    """

    name: str = "noise"
    num_dimensions: int = Field(default=50, ge=1)


def _embed(
    config: NoiseConfig, cells: CellCounts, query: CellCounts | None, seed: int
) -> tuple[F32, F32 | None]:
    draw = partial(normals, stream="noise", seed=seed, dimensions=config.num_dimensions)
    return for_both(draw, cells, query)


BASELINE = BaselineUnit(
    name="noise",
    config=NoiseConfig,
    embed=_embed,
    answers=("embedding",),
    family="control",
    seed_scope="noise",
    title="negative control: Gaussian noise of 50 dimensions",
)
