"""Which cell is seen when: the order of an epoch as arithmetic.

An :class:`EpochPlan` is a pure function of (seed, epoch, cells, their lengths). It knows nothing of
stores, workers or Ray, so it can be tested as a permutation and resumed from a cursor.

How an epoch is ordered
    1. The selected cells, in store order, are cut into runs of ``run_cells`` neighbours, which a
       store reads cheaply. The runs are permuted.
    2. The permuted cells are cut into ``lanes`` equal parts that are walked side by side: a global
       batch takes ``cells_global / lanes`` cells from each lane, so that it mixes distant places
       of the store while each lane still reads its own runs one after another. Lanes do not depend
       on the number of workers; a rank reads its share of the lanes and nothing else.
    3. Inside a window of ``window_batches`` global batches each lane orders its cells by keyed
       draws, or, with ``bucket_by_length``, by length: then a global batch holds cells of like
       length, and the batches of the window are permuted, by the same draw in all lanes.
    4. What does not fill a last global batch is the declared remainder of the epoch: cells chosen
       by keyed draws, others in each epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cellray.core.draw import Draw
from cellray.core.errors import ConfigError

__all__ = ["Cursor", "EpochPlan", "default_lanes"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cursor:
    """A place in training: ``position`` global batches of ``epoch`` have been consumed."""

    epoch: int = 0
    position: int = 0


def default_lanes(cells_global: int, *, most: int = 64) -> int:
    """The largest divisor of ``cells_global`` up to ``most``, whatever the number of workers."""
    return max(n for n in range(1, most + 1) if cells_global % n == 0)


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The order of all epochs of one selection of cells.

    Args:
        joinids: (N,) int64 selected cells, ascending.
        lengths: (N,) int64 expected tokens per cell (e.g. obs ``nnz`` cut at the tokenizer's
            limit), used for bucketing; None leaves batches unbucketed.
        seed: the run's seed.
        cells_global: cells in a global batch, over all ranks and micro-batches.
        lanes: parts of the order walked side by side; divides ``cells_global``.
        run_cells: neighbouring cells kept together when the store's order is permuted.
        window_batches: global batches mixed with each other.

    Raises:
        ConfigError: fewer cells than one global batch, or lanes that do not divide it.
    """

    joinids: I64
    lengths: I64 | None
    seed: int
    cells_global: int
    lanes: int
    run_cells: int = 64
    window_batches: int = 32

    def __post_init__(self) -> None:
        if self.cells_global % self.lanes:
            raise ConfigError(
                f"data.lanes = {self.lanes} does not divide batch.cells_global = "
                f"{self.cells_global}; choose a divisor"
            )
        if len(self.joinids) < self.cells_global:
            raise ConfigError(
                f"the selection has {len(self.joinids)} cells, fewer than one global batch of "
                f"{self.cells_global}; lower batch.cells_global or widen data.obs_filter"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Global batches an epoch delivers."""
        return len(self.joinids) // self.cells_global

    @property
    def remainder_cells(self) -> int:
        """Cells an epoch leaves out because they do not fill a global batch."""
        return len(self.joinids) - self.batches_per_epoch * self.cells_global

    def cursor(self, step: int) -> Cursor:
        """Where training stands when ``step`` global batches have been consumed in all."""
        return Cursor(step // self.batches_per_epoch, step % self.batches_per_epoch)

    def step(self, cursor: Cursor) -> int:
        """The inverse of :meth:`cursor`."""
        return cursor.epoch * self.batches_per_epoch + cursor.position

    def order(self, epoch: int) -> I64:
        """All batches of an epoch: (batches, lanes, cells_global / lanes) indices into joinids."""
        return _order(self, epoch)

    def rows(self, epoch: int, first: int, last: int, *, rank: int = 0, world: int = 1) -> I64:
        """Joinids of batches ``first .. last`` (exclusive) that belong to ``rank`` of ``world``.

        Returns:
            (last - first, cells_global / world) int64.
        """
        if self.lanes % world:
            raise ConfigError(
                f"{world} workers do not divide the plan's {self.lanes} lanes; set data.lanes to "
                f"a multiple of {world} that divides batch.cells_global"
            )
        share = self.lanes // world
        part = self.order(epoch)[first:last, rank * share : (rank + 1) * share]
        return self.joinids[part.reshape(len(part), self.cells_global // world)]

    def _permuted(self, draw: Draw) -> I64:
        """Indices of the epoch's cells, runs permuted; the remainder is left out."""
        total = len(self.joinids)
        left_out = np.zeros(total, dtype=bool)
        if self.remainder_cells:
            chance = draw.bits("plan.remainder", self.joinids)
            left_out[np.argpartition(chance, self.remainder_cells)[: self.remainder_cells]] = True
        runs = np.arange(-(-total // self.run_cells), dtype=np.int64)
        keys = draw.bits("plan.runs", self.joinids[runs * self.run_cells])
        starts = runs[np.argsort(keys, kind="stable")] * self.run_cells
        cells = starts[:, None] + np.arange(self.run_cells)
        cells = cells[cells < total]
        kept: I64 = cells[~left_out[cells]]
        return kept

    def _window(self, lanes_LC: I64, draw: Draw, first: int) -> I64:
        """Order one window; ``lanes_LC``: (lanes, cells per lane of the window)."""
        per_lane = self.cells_global // self.lanes
        batches = lanes_LC.shape[1] // per_lane
        noise = draw.bits("plan.cells", self.joinids[lanes_LC])
        if self.lengths is None:
            by = np.argsort(noise, axis=1, kind="stable")
        else:
            by = np.lexsort((noise, self.lengths[lanes_LC]), axis=1)
        ordered = np.take_along_axis(lanes_LC, by, axis=1)
        grouped = ordered.reshape(self.lanes, batches, per_lane).swapaxes(0, 1)
        which = draw.bits("plan.batches", first, np.arange(batches))
        mixed: I64 = grouped[np.argsort(which, kind="stable")]
        return mixed


@lru_cache(maxsize=2)
def _order(plan: EpochPlan, epoch: int) -> I64:
    draw = Draw(plan.seed, epoch)
    batches = plan.batches_per_epoch
    per_lane = plan.cells_global // plan.lanes
    lanes_LM = plan._permuted(draw).reshape(plan.lanes, batches * per_lane)
    windows = []
    for first in range(0, batches, plan.window_batches):
        last = min(first + plan.window_batches, batches)
        part = lanes_LM[:, first * per_lane : last * per_lane]
        windows.append(plan._window(part, draw, first))
    order: I64 = np.concatenate(windows)
    order.setflags(write=False)
    return order
