"""Which cell is seen when: the order of an epoch as arithmetic.

An :class:`EpochPlan` is a pure function of (seed, epoch, cells, their lengths and groups). It knows
nothing of files, workers or Ray, so it can be tested as a permutation and resumed from a cursor. It
computes the cells of any batch without writing down the order of the epoch: it holds one number for
each run of cells.

How an epoch is ordered
    1. The selected cells, in store order, are cut into runs of ``run_cells`` neighbours, which a
       store reads cheaply. The runs are permuted.
    2. The runs are dealt to ``lanes`` that are walked side by side: a global batch takes
       ``cells_global / lanes`` cells from each lane, so that it mixes distant places of the store
       while each lane still reads whole runs one after another. Lanes do not depend on the number
       of workers; a rank reads its share of the lanes and nothing else.
    3. Inside a window of ``window_batches`` global batches each lane orders its cells by keyed
       draws, or, with ``lengths``, by length: then a global batch holds cells of like length, and
       the batches of the window are permuted, by the same draw in all lanes.
    4. What does not fill a last global batch is the declared remainder of the epoch: cells chosen
       by keyed draws, others in each epoch. Cells of runs that do not fill the lanes evenly come
       at the end of the epoch.

Balanced sampling (``groups``) replaces the cells of step 1 by a multiset of the same size in which
groups are equally frequent, another one each epoch; see :mod:`cellray.data.balance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cellray.core.draw import Draw
from cellray.core.errors import ConfigError
from cellray.core.ids import cell_ids
from cellray.data.balance import Balance

__all__ = ["Cursor", "EpochPlan", "Plan", "default_lanes", "window_batches"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cursor:
    """A place in training: ``position`` global batches of ``epoch`` have been consumed."""

    epoch: int = 0
    position: int = 0


def default_lanes(cells_global: int, *, most: int = 64) -> int:
    """The largest divisor of ``cells_global`` up to ``most``, whatever the number of workers."""
    return max(n for n in range(1, most + 1) if cells_global % n == 0)


def window_batches(cells_global: int, *, lanes: int, run_cells: int, window_cells: int) -> int:
    """Global batches of a window of about ``window_cells`` cells in which lanes read whole runs.

    Args:
        cells_global: cells in a global batch.
        lanes: parts of the order walked side by side.
        run_cells: cells of a run.
        window_cells: cells mixed with each other, over all lanes.
    """
    per_lane = cells_global // lanes
    # the smallest number of batches that ends with a run in every lane
    whole = int(np.lcm(run_cells, per_lane)) // per_lane
    wanted = max(1, window_cells // cells_global)
    if whole > 4 * wanted:  # an odd batch size: some runs are read by two windows
        return wanted
    return max(whole, wanted // whole * whole)


class Plan(Protocol):
    """What a token stream asks of an order of cells."""

    @property
    def cells_global(self) -> int:
        """Cells in a global batch."""
        ...

    @property
    def window_batches(self) -> int:
        """Global batches that are mixed with each other."""
        ...

    @property
    def joinids(self) -> I64:
        """(N,) cell ids of the selection, ascending."""
        ...

    @property
    def batches_per_epoch(self) -> int:
        """Global batches an epoch delivers."""
        ...

    @property
    def remainder_cells(self) -> int:
        """Cells an epoch leaves out because they do not fill a global batch."""
        ...

    @property
    def mean_length(self) -> float | None:
        """Mean expected tokens of a cell, None where lengths are not known."""
        ...

    def cursor(self, step: int) -> Cursor:
        """Where training stands when ``step`` global batches have been consumed in all."""
        ...

    def share(self, rank: int, world: int) -> int:
        """Cells of a global batch that belong to a rank."""
        ...

    def rows(self, epoch: int, first: int, last: int, *, rank: int = 0, world: int = 1) -> I64:
        """(last - first, share) ids of batches ``first .. last`` of an epoch."""
        ...


def rank_lanes(lanes: int, rank: int, world: int) -> range:
    """The lanes of one rank; where workers do not divide the lanes, the first have one more.

    Raises:
        ConfigError: there are more workers than lanes.
    """
    if world > lanes:
        raise ConfigError(
            f"{world} workers cannot share the plan's {lanes} lanes; set data.lanes to at least "
            f"{world}, a divisor of batch.cells_global, or take fewer workers"
        )
    share, more = divmod(lanes, world)
    first = rank * share + min(rank, more)
    return range(first, first + share + (rank < more))


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The order of all epochs of one selection of cells.

    Args:
        joinids: (N,) int64 selected cells, ascending.
        lengths: (N,) expected tokens per cell (e.g. obs ``nnz`` cut at the tokenizer's limit),
            used for bucketing; None leaves batches unbucketed.
        seed: the run's seed.
        cells_global: cells in a global batch, over all ranks and micro-batches.
        lanes: parts of the order walked side by side; divides ``cells_global``.
        run_cells: neighbouring cells kept together when the store's order is permuted.
        window_batches: global batches mixed with each other.
        balance: groups to be made equally frequent, None for every cell once.

    Raises:
        ConfigError: fewer cells than one global batch, or lanes that do not divide it.
    """

    joinids: I64
    lengths: npt.NDArray[np.integer] | None
    seed: int
    cells_global: int
    lanes: int
    run_cells: int = 64
    window_batches: int = 64
    balance: Balance | None = None

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

    @property
    def mean_length(self) -> float | None:
        """Mean expected tokens of a cell, None where lengths are not known."""
        return None if self.lengths is None else float(self.lengths.mean())

    def cursor(self, step: int) -> Cursor:
        """Where training stands when ``step`` global batches have been consumed in all."""
        return Cursor(step // self.batches_per_epoch, step % self.batches_per_epoch)

    def step(self, cursor: Cursor) -> int:
        """The inverse of :meth:`cursor`."""
        return cursor.epoch * self.batches_per_epoch + cursor.position

    def rows(self, epoch: int, first: int, last: int, *, rank: int = 0, world: int = 1) -> I64:
        """Cell ids of batches ``first .. last`` (exclusive) that belong to ``rank`` of ``world``.

        Returns:
            (last - first, share) int64.
        """
        mine = rank_lanes(self.lanes, rank, world)
        ids = self.lane_rows(epoch, first, last, np.asarray(mine))
        return ids.reshape(len(ids), self.share(rank, world))

    def share(self, rank: int, world: int) -> int:
        """Cells of a global batch that belong to a rank."""
        return len(rank_lanes(self.lanes, rank, world)) * (self.cells_global // self.lanes)

    def lane_rows(self, epoch: int, first: int, last: int, lanes: I64) -> I64:
        """Cell ids of some lanes.

        Args:
            epoch: the pass over the data.
            first: first global batch of the epoch.
            last: one past the last.
            lanes: (L,) numbers of lanes.

        Returns:
            (last - first, L, cells of a lane) int64.
        """
        assert 0 <= first <= last <= self.batches_per_epoch, f"batches {first}..{last}"
        parts = []
        start = first // self.window_batches * self.window_batches
        for begin in range(start, last, self.window_batches):
            end = min(begin + self.window_batches, self.batches_per_epoch)
            window = self._window(epoch, begin, end, lanes)
            parts.append(window[max(first - begin, 0) : last - begin])
        per_lane = self.cells_global // self.lanes
        if not parts:
            empty = np.zeros((0, len(lanes), per_lane), dtype=np.int64)
            return empty
        return _order(self, epoch).ids(np.concatenate(parts))

    def batch_lengths(self, epoch: int, first: int, last: int) -> I64:
        """(last - first,) rank of each batch's typical length within its window; 0 if unbucketed.

        Batches of a window hold ever longer cells before they are mixed, in all lanes alike, so
        that no lane needs to be looked at.
        """
        sizes = np.zeros(last - first, dtype=np.int64)
        if self.lengths is None:
            return sizes
        start = first // self.window_batches * self.window_batches
        for begin in range(start, last, self.window_batches):
            end = min(begin + self.window_batches, self.batches_per_epoch)
            turn = self._turns(epoch, begin, end)
            # windows of unlike size (the last of an epoch) are put on one scale
            scaled = turn * self.window_batches // max(end - begin, 1)
            low, high = max(first, begin), min(last, end)
            sizes[low - first : high - first] = scaled[low - begin : high - begin]
        return sizes

    def _turns(self, epoch: int, first: int, last: int) -> I64:
        """(last - first,) which of a window's batches, shortest cells first, comes when."""
        which = Draw(self.seed, epoch).bits("plan.batches", first, np.arange(last - first))
        return np.argsort(which, kind="stable")

    def _window(self, epoch: int, first: int, last: int, lanes: I64) -> I64:
        """One window in its order: (batches, L, cells of a lane) places."""
        order, draw = _order(self, epoch), Draw(self.seed, epoch)
        per_lane = self.cells_global // self.lanes
        places_LC = order.lane_places(lanes, first * per_lane, last * per_lane)
        noise = draw.bits("plan.cells", order.ids(places_LC))
        if self.lengths is None:
            by = np.argsort(noise, axis=1, kind="stable")
        else:
            by = np.lexsort((noise, self.lengths[order.index(places_LC)]), axis=1)
        ordered = np.take_along_axis(places_LC, by, axis=1)
        grouped = ordered.reshape(len(lanes), last - first, per_lane).swapaxes(0, 1)
        mixed: I64 = grouped[self._turns(epoch, first, last)]
        return mixed


@dataclass(frozen=True, eq=False)
class _Order:
    """The order of one epoch before windows are mixed, in closed form.

    A *place* is a position in the epoch's cells: an index into ``joinids``, or, with balanced
    sampling, into ``cells``.

    Attributes:
        joinids: of the plan.
        cells: (N,) indices into joinids, balanced sampling only.
        copies: (N,) how often the cell has come before.
        run_cells: cells of a run.
        runs: permuted numbers of the runs that are dealt to lanes, ``per_lane`` to each.
        per_lane: whole runs of a lane.
        tails: (lanes, r) places that follow a lane's runs.
        left_out: ascending places of the runs that belong to the remainder.
        instead: the places that stand in for them.
    """

    joinids: I64
    cells: I64 | None
    copies: I64 | None
    run_cells: int
    runs: I64
    per_lane: int
    tails: I64
    left_out: I64
    instead: I64

    def index(self, places: I64) -> I64:
        """Indices into joinids."""
        return places if self.cells is None else self.cells[places]

    def ids(self, places: I64) -> I64:
        """Cell ids."""
        if self.cells is None or self.copies is None:
            return self.joinids[places]
        return cell_ids(self.joinids[self.cells[places]], repeats=self.copies[places])

    def lane_places(self, lanes: I64, first: int, last: int) -> I64:
        """(L, last - first) places at offsets ``first .. last`` of lanes."""
        main = self.per_lane * self.run_cells
        inside = np.arange(first, max(first, min(last, main)), dtype=np.int64)
        runs = self.runs[lanes[:, None] * self.per_lane + inside // self.run_cells]
        places = runs * self.run_cells + inside % self.run_cells
        if len(self.left_out):
            at = np.minimum(np.searchsorted(self.left_out, places), len(self.left_out) - 1)
            places = np.where(self.left_out[at] == places, self.instead[at], places)
        tail = self.tails[lanes, max(first - main, 0) : max(last - main, 0)]
        joined: I64 = np.concatenate([places, tail], axis=1)
        return joined


def _distinct(draw: Draw, count: int, below: int) -> I64:
    """``count`` distinct numbers below ``below`` by keyed draws, ascending."""
    found = np.zeros(0, dtype=np.int64)
    asked = count
    while len(found) < count:
        asked *= 2
        bits = draw.bits("plan.remainder", np.arange(asked)) % np.uint64(below)
        _, where = np.unique(bits, return_index=True)
        found = bits[np.sort(where)][:count].astype(np.int64)
    return np.sort(found)


@lru_cache(maxsize=4)
def _order(plan: EpochPlan, epoch: int) -> _Order:
    draw, run = Draw(plan.seed, epoch), plan.run_cells
    total, lanes = len(plan.joinids), plan.lanes
    cells = copies = None
    if plan.balance is not None:
        cells, copies = plan.balance.cells(plan.joinids, draw)
    lane_cells = plan.batches_per_epoch * (plan.cells_global // lanes)
    per_lane = lane_cells // run
    keys = draw.bits("plan.runs", np.arange(total // run))
    runs = np.argsort(keys, kind="stable").astype(np.int64)
    dealt, rest = runs[: lanes * per_lane], runs[lanes * per_lane :]
    pool = (rest[:, None] * run + np.arange(run)).reshape(-1)
    pool = np.concatenate([pool, np.arange(total // run * run, total, dtype=np.int64)])
    pool = pool[np.argsort(draw.bits("plan.pool", pool), kind="stable")]
    left_out = _distinct(draw, plan.remainder_cells, total) if plan.remainder_cells else pool[:0]
    kept = pool[~np.isin(pool, left_out)]
    replaced = left_out[~np.isin(left_out, pool)]
    tails = kept[len(replaced) :].reshape(lanes, lane_cells - per_lane * run)
    return _Order(
        joinids=plan.joinids,
        cells=cells,
        copies=copies,
        run_cells=run,
        runs=dealt,
        per_lane=per_lane,
        tails=tails,
        left_out=replaced,
        instead=kept[: len(replaced)],
    )
