"""Several stores at once: a mixture in which every store keeps its share of each global batch.

The lanes of a global batch are divided among the stores by weight, so that every batch holds the
same number of cells of each store. A store that is small for its weight is passed through several
times while a large one is passed through once; each store's own order is an
:class:`~cellray.data.plan.EpochPlan`, reshuffled at every pass. Like that plan, a mixture is a pure
function of its parts and can be resumed at any step on any number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cellray.core.draw import Draw
from cellray.core.errors import ConfigError
from cellray.core.ids import cell_ids
from cellray.data.plan import Cursor, EpochPlan, rank_lanes

__all__ = ["MixturePlan", "deal_lanes"]

I64 = npt.NDArray[np.int64]

_PASSES = 32  # passes of a store told apart in a cell id; copies of balanced sampling use the rest
MAX_COPIES = 64


def deal_lanes(weights: Sequence[float], lanes: int) -> I64:
    """Which store each lane reads: lanes in proportion to the weights, well mixed.

    Args:
        weights: one number above 0 a store, in any scale.
        lanes: lanes in all.

    Returns:
        (lanes,) store numbers.

    Raises:
        ConfigError: a weight that is not above 0, or too small for a single lane.
    """
    share = np.asarray(weights, dtype=np.float64)
    if not (np.isfinite(share).all() and (share > 0).all()):
        raise ConfigError(f"data.weights = {list(weights)}: every weight must be above 0")
    exact = share / share.sum() * lanes
    counts = np.floor(exact).astype(np.int64)
    missing = lanes - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    if (counts == 0).any():
        small = [f"{w:g}" for w, c in zip(weights, counts, strict=True) if c == 0]
        raise ConfigError(
            f"data.weights: {', '.join(small)} of {share.sum():g} is less than one of the "
            f"{lanes} lanes; raise the weight, or data.lanes (a divisor of batch.cells_global)"
        )
    # the k-th of c lanes of a store belongs at (k + 1/2) / c of the way
    at = [(np.arange(c) + 0.5) / c for c in counts]
    store = np.repeat(np.arange(len(counts)), counts)
    dealt: I64 = store[np.argsort(np.concatenate(at), kind="stable")]
    return dealt


@dataclass(frozen=True, eq=False)
class MixturePlan:
    """The order of a mixture of stores.

    An epoch of a mixture lasts until the store with the longest pass has been passed through once.

    Args:
        parts: one plan a store, all with the same ``window_batches``, seed and cells in a lane; the
            lanes of part i are as many as the lanes dealt to it.
        lane_parts: (lanes,) which part each lane of the mixture reads.
    """

    parts: tuple[EpochPlan, ...]
    lane_parts: I64

    def __post_init__(self) -> None:
        per_lane = {p.cells_global // p.lanes for p in self.parts}
        windows = {p.window_batches for p in self.parts}
        dealt = np.bincount(self.lane_parts, minlength=len(self.parts)).tolist()
        assert len(per_lane) == len(windows) == 1, "parts differ in lanes or windows"
        assert dealt == [p.lanes for p in self.parts], "lanes are not dealt as the parts say"

    @property
    def lanes(self) -> int:
        """Parts of the order walked side by side, over all stores."""
        return len(self.lane_parts)

    @property
    def cells_global(self) -> int:
        """Cells in a global batch."""
        return sum(p.cells_global for p in self.parts)

    @property
    def window_batches(self) -> int:
        """Global batches that are mixed with each other."""
        return self.parts[0].window_batches

    @cached_property
    def joinids(self) -> I64:
        """(N,) cell ids of all stores, ascending."""
        return np.concatenate([p.joinids for p in self.parts])

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of the longest pass through a store."""
        return max(p.batches_per_epoch for p in self.parts)

    @property
    def remainder_cells(self) -> int:
        """Cells left out of one pass through every store."""
        return sum(p.remainder_cells for p in self.parts)

    @property
    def mean_length(self) -> float | None:
        """Mean expected tokens of a cell of a batch, None where lengths are not known."""
        means = [p.mean_length for p in self.parts]
        known = [m for m in means if m is not None]
        if len(known) < len(means):
            return None
        return float(np.average(known, weights=[p.lanes for p in self.parts]))

    def cursor(self, step: int) -> Cursor:
        """Where training stands when ``step`` global batches have been consumed in all."""
        return Cursor(step // self.batches_per_epoch, step % self.batches_per_epoch)

    def rows(self, epoch: int, first: int, last: int, *, rank: int = 0, world: int = 1) -> I64:
        """Cell ids of batches ``first .. last`` (exclusive) that belong to ``rank`` of ``world``.

        Returns:
            (last - first, share) int64.
        """
        mine = np.asarray(rank_lanes(self.lanes, rank, world))
        size = self.window_batches
        parts = []
        for start in range(first // size * size, last, size):
            window = self._window(epoch, start, min(start + size, self.batches_per_epoch), mine)
            parts.append(window[max(first - start, 0) : last - start])
        share = self.share(rank, world)
        return np.concatenate(parts).reshape(-1, share) if parts else np.zeros((0, share), np.int64)

    def share(self, rank: int, world: int) -> int:
        """Cells of a global batch that belong to a rank."""
        return len(rank_lanes(self.lanes, rank, world)) * (self.cells_global // self.lanes)

    def _window(self, epoch: int, first: int, last: int, lanes: I64) -> I64:
        """(last - first, L, cells of a lane) ids of one window of an epoch for some lanes."""
        steps = last - first
        begin = epoch * self.batches_per_epoch + first
        per_lane = self.cells_global // self.lanes
        window = np.empty((steps, len(lanes), per_lane), dtype=np.int64)
        position = np.zeros(self.lanes, dtype=np.int64)  # of a lane among those of its part
        for i in range(len(self.parts)):
            position[self.lane_parts == i] = np.arange(self.parts[i].lanes)
        order = np.argsort(Draw(self.parts[0].seed).bits("mixture", begin, np.arange(steps)))
        for i, part in enumerate(self.parts):
            here = np.flatnonzero(self.lane_parts[lanes] == i)
            if len(here):
                ids = self._part_rows(part, begin, begin + steps, position[lanes[here]])
                window[:, here] = ids[order]
        return window

    @staticmethod
    def _part_rows(part: EpochPlan, start: int, end: int, lanes: I64) -> I64:
        """(end - start, L, cells of a lane) ids of one store, batches of short cells first."""
        found, sizes = [], []
        step = start
        while step < end:
            cursor = part.cursor(step)
            last = min(part.batches_per_epoch, cursor.position + end - step)
            # all lanes of the part take the same turn, whichever of them this rank reads
            ids = part.lane_rows(cursor.epoch, cursor.position, last, lanes)
            found.append(cell_ids(ids, repeats=cursor.epoch % _PASSES * MAX_COPIES))
            sizes.append(part.batch_lengths(cursor.epoch, cursor.position, last))
            step += last - cursor.position
        order = np.argsort(np.concatenate(sizes), kind="stable")
        rows: I64 = np.concatenate(found)[order]
        return rows
