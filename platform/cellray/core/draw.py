"""Order-free randomness: every draw is a hash of what it is for, never of who asked first.

A value depends on (seed, epoch, stream, cell, position) alone, so the same cell is masked and
sampled alike whatever block, batch, rank or worker it travels in.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Draw", "splitmix64"]

U64 = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def splitmix64(x: U64) -> U64:
    """The SplitMix64 finaliser (Steele et al. 2014, doi:10.1145/2714064.2660195), vectorised."""
    with np.errstate(over="ignore"):
        z = x + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        return z ^ (z >> np.uint64(31))


def _u64(values: npt.ArrayLike) -> U64:
    array = np.asarray(values)
    return array.astype(np.uint64) if array.dtype != np.uint64 else array


@dataclass(frozen=True)
class Draw:
    """Keyed uniform draws for one epoch of one run.

    Args:
        seed: the run's seed, >= 0.
        epoch: the pass over the data, >= 0.
    """

    seed: int
    epoch: int = 0

    def bits(self, stream: str, cells: npt.ArrayLike, positions: npt.ArrayLike = 0) -> U64:
        """64 random bits for each (cell, position) pair, broadcast together.

        Args:
            stream: what the draw is for, e.g. ``"mask"``; streams are independent.
            cells: cell ids (SOMA joinids), any integer shape.
            positions: a second key that broadcasts against ``cells``, e.g. token ids.
        """
        return splitmix64(self.cell_keys(stream, cells) ^ splitmix64(_u64(positions)))

    def cell_keys(self, stream: str, cells: npt.ArrayLike) -> U64:
        """The per-cell half of :meth:`bits`, for compiled kernels that finish the hash themselves.

        ``bits(stream, cells, p) == splitmix64(cell_keys(stream, cells) ^ splitmix64(p))``.
        """
        key = np.array([zlib.crc32(stream.encode())], dtype=np.uint64)
        for part in (self.seed, self.epoch):
            key = splitmix64(key ^ splitmix64(np.array([part], dtype=np.uint64)))
        return splitmix64(_u64(cells) ^ key[0])

    def uniform(
        self, stream: str, cells: npt.ArrayLike, positions: npt.ArrayLike = 0
    ) -> npt.NDArray[np.float64]:
        """Uniform values in [0, 1), 53 bits each; arguments as in :meth:`bits`."""
        bits = self.bits(stream, cells, positions) >> np.uint64(11)
        return np.asarray(bits * np.float64(2.0**-53), dtype=np.float64)
