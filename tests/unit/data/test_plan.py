"""The epoch plan: a permutation, the same for any number of workers, resumable anywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.core.errors import ConfigError
from cellray.data.plan import Cursor, EpochPlan, default_lanes
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


@settings(max_examples=60, deadline=None)
@given(
    num_cells=st.integers(24, 700),
    cells_global=st.sampled_from([1, 4, 12, 24]),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    window=st.integers(1, 40),
    run=st.integers(1, 80),
    lengths=st.booleans(),
)
def test_an_epoch_delivers_every_cell_once_minus_the_remainder(
    num_cells, cells_global, seed, epoch, window, run, lengths
):
    plan = make(
        num_cells,
        cells_global=cells_global,
        seed=seed,
        window_batches=window,
        run_cells=run,
        lengths=lengths,
    )
    rows = plan.rows(epoch, 0, plan.batches_per_epoch)
    assert len(np.unique(rows)) == rows.size == num_cells - plan.remainder_cells
    assert plan.remainder_cells < cells_global
    assert set(rows.reshape(-1)) <= set(plan.joinids)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_global_batches_do_not_depend_on_the_number_of_workers(world):
    plan = make()
    whole = plan.rows(2, 0, plan.batches_per_epoch)
    parts = [plan.rows(2, 0, plan.batches_per_epoch, rank=r, world=world) for r in range(world)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)
    assert all(p.shape[1] == 24 // world for p in parts)


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


def test_workers_must_divide_the_lanes():
    with pytest.raises(ConfigError, match="5 workers do not divide the plan's 24 lanes"):
        make().rows(0, 0, 1, rank=0, world=5)


def test_default_lanes():
    assert [default_lanes(n) for n in (1, 32, 48, 2048, 134)] == [1, 32, 48, 64, 2]
