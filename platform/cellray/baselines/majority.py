"""The majority class: what a method that looks at nothing scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from cellray.baselines.base import (
    BaselineConfig,
    BaselineUnit,
    Labelled,
    check_genes,
    check_training,
)

__all__ = ["BASELINE", "MajorityConfig"]

I64 = npt.NDArray[np.int64]


class MajorityConfig(BaselineConfig):
    """No keys beside the name."""

    name: str = "majority"


@dataclass(frozen=True)
class _Majority:
    """Attributes: ``share`` of the training cells that have the class ``label``."""

    num_genes: int
    label: int
    share: float

    def answer(self, counts: sparse.csr_matrix) -> Labelled:
        check_genes(counts, self.num_genes)
        num = counts.shape[0]
        return Labelled(np.full(num, self.label, dtype=np.int64), np.full(num, self.share))

    def predict(self, counts: sparse.csr_matrix) -> I64:
        return self.answer(counts).codes

    def embed(self, counts: sparse.csr_matrix) -> None:
        return None


def _fit(config: MajorityConfig, counts: sparse.csr_matrix, labels: I64, seed: int) -> _Majority:
    check_training(counts, labels)
    frequencies = np.bincount(labels)
    label = int(frequencies.argmax())
    return _Majority(counts.shape[1], label, float(frequencies[label] / len(labels)))


BASELINE = BaselineUnit(
    name="majority",
    config=MajorityConfig,
    fit=_fit,
    seed_scope="",
    title="the most frequent training class; a tie goes to the first",
)
