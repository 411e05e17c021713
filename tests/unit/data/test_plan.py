"""The epoch plan: a permutation, the same for any number of workers, resumable anywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.core.errors import ConfigError
from cellray.data.plan import Cursor, EpochPlan, default_lanes, window_batches
from cellray.testing import assert_same_cells


def make(num_cells=500, *, cells_global=24, lanes=0, seed=1, lengths=True, **keys):
    joinids = np.arange(num_cells, dtype=np.int64) * 3 + 5
    nnz = np.random.default_rng(0).integers(1, 999, num_cells) if lengths else None
    return EpochPlan(
        joinids=joinids,
        lengths=nnz,
        seed=seed,
        cells_global=cells_global,
        lanes=lanes or default_lanes(cells_global),
        **keys,
    )


@settings(max_examples=100, deadline=None)
@given(
    num_cells=st.integers(24, 900),
    cells_global=st.sampled_from([1, 4, 12, 24]),
    lanes=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    window=st.integers(1, 40),
    run=st.integers(1, 80),
    lengths=st.booleans(),
)
def test_an_epoch_delivers_every_cell_once_minus_the_remainder(
    num_cells, cells_global, lanes, seed, epoch, window, run, lengths
):
    plan = make(
        num_cells,
        cells_global=cells_global,
        lanes=1 if cells_global == 1 else lanes,
        seed=seed,
        window_batches=window,
        run_cells=run,
        lengths=lengths,
    )
    rows = plan.rows(epoch, 0, plan.batches_per_epoch)
    assert len(np.unique(rows)) == rows.size == num_cells - plan.remainder_cells
    assert plan.remainder_cells < cells_global
    assert set(rows.reshape(-1)) <= set(plan.joinids)


@settings(max_examples=60, deadline=None)
@given(
    num_cells=st.integers(24, 900),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
    window=st.integers(1, 12),
    run=st.sampled_from([1, 7, 64]),
    stop=st.integers(0, 40),
    worlds=st.tuples(*[st.sampled_from([1, 2, 3, 4, 6, 12, 24])] * 2),
)
def test_any_resume_on_any_other_number_of_workers_keeps_the_order(
    num_cells, seed, epoch, window, run, stop, worlds
):
    plan = make(num_cells, seed=seed, window_batches=window, run_cells=run)
    last = plan.batches_per_epoch
    stop = min(stop, last)
    whole = plan.rows(epoch, 0, last)
    for world, first, end in ((worlds[0], 0, stop), (worlds[1], stop, last)):
        parts = [plan.rows(epoch, first, end, rank=r, world=world) for r in range(world)]
        assert np.array_equal(np.concatenate(parts, axis=1), whole[first:end])


@pytest.mark.parametrize("stop", [0, 1, 7, 19])
def test_resuming_anywhere_with_other_workers_sees_no_cell_twice_and_misses_none(stop):
    plan = make()
    before = [plan.rows(0, 0, stop, rank=r, world=2) for r in range(2)]
    after = [plan.rows(0, stop, plan.batches_per_epoch, rank=r, world=6) for r in range(6)]
    assert_same_cells([*before, *after], plan.rows(0, 0, plan.batches_per_epoch))


def test_epochs_and_seeds_differ_and_repeat():
    a, b = make(), make()
    assert np.array_equal(a.rows(0, 0, 20), b.rows(0, 0, 20))
    assert not np.array_equal(a.rows(0, 0, 20), a.rows(1, 0, 20))
    assert not np.array_equal(a.rows(0, 0, 20), make(seed=2).rows(0, 0, 20))


def test_the_remainder_changes_between_epochs():
    plan = make(519)
    left = [
        frozenset(plan.joinids) - frozenset(plan.rows(e, 0, plan.batches_per_epoch).reshape(-1))
        for e in range(4)
    ]
    assert {len(x) for x in left} == {519 % 24}
    assert len(set(left)) == 4


def test_every_cell_is_left_out_equally_often():
    plan = make(64 * 24 * 2 + 23, cells_global=24, run_cells=64, window_batches=64)
    missed = np.zeros(len(plan.joinids), dtype=int)
    epochs = 600
    for epoch in range(epochs):
        rows = plan.rows(epoch, 0, plan.batches_per_epoch).reshape(-1)
        missed += ~np.isin(plan.joinids, rows)
    assert missed.sum() == 23 * epochs
    # the last 23 cells fill no run of their own: they must not be missed more than the others
    assert missed[-23:].mean() == pytest.approx(missed.mean(), rel=0.5)
    assert missed.max() < 20  # 4.5 expected


def test_whole_runs_are_read_together_wherever_they_fill_the_lanes():
    """A window reads whole runs: its cells fall into as few runs as can hold them."""
    size = window_batches(32, lanes=16, run_cells=64, window_cells=4096)
    plan = make(40_000, cells_global=32, lanes=16, run_cells=64, window_batches=size)
    assert size * 32 == 4096
    for first in range(0, plan.batches_per_epoch - size, size):
        runs = np.unique((plan.rows(0, first, first + size) - 5) // 3 // 64)
        assert (
            len(runs) <= 4096 // 64 + 1
        )  # one cell of another run may stand in for a left-out one


@pytest.mark.parametrize(
    ("cells_global", "lanes", "run_cells", "window_cells", "expected"),
    [
        (64, 64, 64, 16_384, 256),
        (2048, 64, 64, 16_384, 8),
        (2048, 64, 64, 1, 2),  # at least a whole run in every lane
        (12, 12, 64, 16_384, 1344),
        (48, 48, 100, 4_800, 100),
        (61 * 61, 61, 64, 3_721, 1),  # no common multiple in reach: runs are split
    ],
)
def test_window_batches(cells_global, lanes, run_cells, window_cells, expected):
    found = window_batches(
        cells_global, lanes=lanes, run_cells=run_cells, window_cells=window_cells
    )
    assert found == expected


def test_bucketing_puts_cells_of_like_length_in_a_batch():
    spread = {}
    for lengths in (True, False):
        plan = make(2400, lengths=lengths)
        nnz = np.random.default_rng(0).integers(1, 999, 2400)
        rows = plan.rows(0, 0, plan.batches_per_epoch)
        spread[lengths] = nnz[(rows - 5) // 3].std(axis=1).mean()
    assert spread[True] < 0.25 * spread[False]


def test_a_batch_mixes_distant_places_of_the_store():
    plan = make(6400, cells_global=32, run_cells=16, lengths=False)
    rows = plan.rows(0, 0, plan.batches_per_epoch)
    tenths = (rows - 5) // 3 // 640
    distinct = np.mean([len(np.unique(batch)) for batch in tenths])
    expected = 10 * (1 - 0.9**32)  # of 10 tenths in 32 independent draws
    assert distinct > 0.93 * expected


def test_a_plan_of_thirty_million_cells_holds_a_number_a_run_and_finds_any_batch():
    joinids = np.arange(30_000_000, dtype=np.int64)
    plan = EpochPlan(joinids, None, seed=0, cells_global=2048, lanes=64, window_batches=8)
    rows = plan.rows(5, 7000, 7002, rank=3, world=8)
    again = plan.rows(5, 6992, 7008)
    assert np.array_equal(rows, again[8:10, 3 * 256 : 4 * 256])
    assert len(np.unique(again)) == again.size


def test_cursor_and_step_are_inverse():
    plan = make()
    assert plan.batches_per_epoch == 20
    assert plan.cursor(45) == Cursor(epoch=2, position=5)
    assert [plan.step(plan.cursor(s)) for s in range(50)] == list(range(50))


def test_too_few_cells():
    with pytest.raises(ConfigError, match="10 cells, fewer than one global batch of 24"):
        make(10)


def test_lanes_must_divide_the_global_batch():
    with pytest.raises(ConfigError, match="data.lanes = 7 does not divide batch.cells_global = 24"):
        make(lanes=7)


def test_more_workers_than_lanes():
    with pytest.raises(ConfigError, match="25 workers cannot share the plan's 24 lanes"):
        make().rows(0, 0, 1, rank=0, world=25)


@pytest.mark.parametrize("world", [2, 5, 7, 24])
def test_workers_that_do_not_divide_the_lanes_share_the_same_cells(world):
    plan = make()
    whole = plan.rows(0, 0, 3)
    parts = [plan.rows(0, 0, 3, rank=rank, world=world) for rank in range(world)]
    assert [p.shape[1] for p in parts] == [plan.share(rank, world) for rank in range(world)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


def test_default_lanes():
    assert [default_lanes(n) for n in (1, 32, 48, 2048, 134)] == [1, 32, 48, 64, 2]
