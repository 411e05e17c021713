"""Labels drawn as often as training cells have them, whatever the cell: a negative control."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cellray.baselines.base import BaselineConfig, BaselineUnit, CellCounts, Labelled

__all__ = ["BASELINE", "ShuffledConfig"]


class ShuffledConfig(BaselineConfig):
    """No keys beside the name."""

    name: str = "shuffled_labels"


def _answer(
    config: ShuffledConfig,
    train: CellCounts,
    labels: npt.NDArray[np.int64],
    query: CellCounts,
    seed: int,
) -> Labelled:
    """Training labels drawn with replacement."""
    drawn = np.random.default_rng(seed).integers(0, len(labels), size=len(query))
    return Labelled(labels[drawn], np.full(len(query), np.bincount(labels).max() / len(labels)))


BASELINE = BaselineUnit(
    name="shuffled_labels",
    config=ShuffledConfig,
    seed_scope="the draw",
    title="labels drawn at random with the frequencies of training: knows nothing",
    answer=_answer,
    family="control",
    control="negative",
)
