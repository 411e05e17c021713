"""Positive control of an embedding: the true cell type, one-hot, with a little noise.

It is made from the truth: what a metric gives here is the most that it can give. The jitter keeps
neighbours apart, as in the control of Luecken et al. 2022 (doi:10.1038/s41592-021-01336-8).

Legend: N cells, C classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cellray.baselines._chance import normals
from cellray.baselines.base import BaselineConfig, BaselineUnit, CellCounts

__all__ = ["BASELINE", "CelltypeJitterConfig"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


class CelltypeJitterConfig(BaselineConfig):
    """Keys of the control.

    Attributes:
        jitter: standard deviation of the noise on each of the C numbers; types are sqrt(2) apart.
    """

    name: str = "celltype_jitter"
    jitter: float = Field(default=0.05, gt=0)


def _embed_labels(config: CelltypeJitterConfig, cells: CellCounts, labels: I64, seed: int) -> F32:
    classes, codes = np.unique(labels, return_inverse=True)
    noise = normals(cells.counts, "jitter", seed, len(classes))
    return np.eye(len(classes), dtype=np.float32)[codes] + np.float32(config.jitter) * noise


BASELINE = BaselineUnit(
    name="celltype_jitter",
    config=CelltypeJitterConfig,
    embed_labels=_embed_labels,
    answers=("embedding",),
    family="control",
    seed_scope="jitter",
    title="positive control: the true cell type with a little noise",
)
