"""Random numbers of a cell that depend on its counts and the seed, not on its place or company.

Legend: N cells, D numbers of a cell.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.special import ndtri

from cellray.core.draw import Draw, splitmix64

__all__ = ["cell_keys", "normals", "uniforms"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U64 = npt.NDArray[np.uint64]


def cell_keys(counts: sparse.csr_matrix) -> U64:
    """A hash of each cell's counts, (N,); cells with the same counts share it.

    Args:
        counts: (N, G) raw counts, every entry given once.
    """
    entries = splitmix64(
        splitmix64(counts.indices.astype(np.uint64)) ^ counts.data.astype(np.uint64)
    )
    entries[counts.data == 0] = 0
    with np.errstate(over="ignore"):  # sums wrap, as a hash may
        sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(entries, dtype=np.uint64)])
        return splitmix64(sums[counts.indptr[1:]] - sums[counts.indptr[:-1]])


def uniforms(counts: sparse.csr_matrix, stream: str, seed: int) -> F64:
    """One uniform number in [0, 1) for each cell of ``counts``, (N,)."""
    return Draw(seed).uniform(stream, cell_keys(counts))


def normals(counts: sparse.csr_matrix, stream: str, seed: int, dimensions: int) -> F32:
    """Standard normal numbers for each cell of ``counts``, (N, D)."""
    keys = cell_keys(counts)[:, None]
    chances = Draw(seed).uniform(stream, keys, np.arange(dimensions)[None, :])
    return np.asarray(ndtri(chances + 2.0**-54), dtype=np.float32)  # never 0, so never infinite
