"""The true labels with a little noise as an embedding: the positive control."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cellray.baselines.base import F32, BaselineConfig, BaselineUnit

__all__ = ["BASELINE", "JitterConfig"]


class JitterConfig(BaselineConfig):
    """Keys of the control.

    Attributes:
        deviation: standard deviation of the noise, where two classes are at distance 1.41.
    """

    name: str = "celltype_jitter"
    deviation: float = Field(default=0.05, gt=0)


def _tell(config: JitterConfig, labels: npt.NDArray[np.int64], seed: int) -> F32:
    """One dimension a class, 1 for a cell's own, and normal noise on all of them."""
    corners = np.eye(int(labels.max()) + 1, dtype=np.float32)[labels]
    noise = np.random.default_rng(seed).standard_normal(corners.shape, dtype=np.float32)
    return np.asarray(corners + np.float32(config.deviation) * noise, dtype=np.float32)


BASELINE = BaselineUnit(
    name="celltype_jitter",
    config=JitterConfig,
    seed_scope="the noise",
    title="the true cell types with a little noise: what a perfect embedding scores",
    tell=_tell,
    family="control",
    control="positive",
)
