"""Negative control of labels: a training label drawn at random, as often as it occurs.

What it scores is what class frequencies alone are worth by a metric. A cell's draw is a function of
its counts and the seed, so that it does not depend on the other cells.

Legend: N training cells, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from cellray.baselines._chance import uniforms
from cellray.baselines.base import (
    BaselineConfig,
    BaselineUnit,
    Labelled,
    check_genes,
    check_training,
)

__all__ = ["BASELINE", "ShuffledLabelsConfig"]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


class ShuffledLabelsConfig(BaselineConfig):
    """No keys beside the name."""

    name: str = "shuffled_labels"


@dataclass(frozen=True)
class _Shuffled:
    """Shapes: ``frequencies`` (C,) shares of the training cells, by code."""

    num_genes: int
    frequencies: F64
    seed: int

    def answer(self, counts: sparse.csr_matrix) -> Labelled:
        check_genes(counts, self.num_genes)
        chances = uniforms(counts, "label", self.seed)
        bounds = np.cumsum(self.frequencies)
        bounds /= bounds[-1]
        codes = np.searchsorted(bounds, chances, side="right").astype(np.int64)
        return Labelled(codes, self.frequencies[codes])

    def predict(self, counts: sparse.csr_matrix) -> I64:
        return self.answer(counts).codes

    def embed(self, counts: sparse.csr_matrix) -> None:
        return None


def _fit(
    config: ShuffledLabelsConfig, counts: sparse.csr_matrix, labels: I64, seed: int
) -> _Shuffled:
    check_training(counts, labels)
    return _Shuffled(counts.shape[1], np.bincount(labels) / len(labels), seed)


BASELINE = BaselineUnit(
    name="shuffled_labels",
    config=ShuffledLabelsConfig,
    fit=_fit,
    family="control",
    seed_scope="draw",
    title="negative control: a training label drawn at random",
)
