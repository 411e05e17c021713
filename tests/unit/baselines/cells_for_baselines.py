"""Small made cells for the baselines: three types, each with genes of its own."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import sparse

__all__ = ["made_cells"]


def made_cells(
    num: int = 150, *, num_genes: int = 120, seed: int = 0
) -> tuple[sparse.csr_matrix, npt.NDArray[np.int64]]:
    """(num, num_genes) raw counts and codes 0..2; type c has genes 10c..10c+9 up eightfold."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num) % 3).astype(np.int64)
    rates = np.tile(rng.gamma(2.0, 0.4, num_genes), (num, 1))
    for code in range(3):
        rates[np.ix_(labels == code, range(10 * code, 10 * code + 10))] *= 8
    rates *= rng.lognormal(0, 0.4, (num, 1))
    return sparse.csr_matrix(rng.poisson(rates).astype(np.float32)), labels
