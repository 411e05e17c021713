"""A mixture of stores: shares of every batch, passes, resume, any number of workers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.core.errors import ConfigError
from cellray.core.ids import cell_ids, stores_of, without_repeats
from cellray.data.mixture import MixturePlan, deal_lanes
from cellray.data.plan import EpochPlan, window_batches


def make(sizes=(700, 130), *, weights=(3, 1), lanes=8, per_lane=2, seed=0, lengths=False, run=8):
    lane_parts = deal_lanes(weights, lanes)
    size = window_batches(
        lanes * per_lane, lanes=lanes, run_cells=run, window_cells=16 * lanes * per_lane
    )
    parts = []
    for i, (number, dealt) in enumerate(zip(sizes, np.bincount(lane_parts), strict=True)):
        nnz = np.random.default_rng(i).integers(1, 999, number) if lengths else None
        parts.append(
            EpochPlan(
                joinids=cell_ids(np.arange(number), store=i),
                lengths=nnz,
                seed=seed,
                cells_global=int(dealt) * per_lane,
                lanes=int(dealt),
                run_cells=run,
                window_batches=size,
            )
        )
    return MixturePlan(tuple(parts), lane_parts)


def test_every_batch_holds_each_stores_share():
    plan = make()
    rows = plan.rows(0, 0, plan.batches_per_epoch)
    assert plan.cells_global == 16
    assert {tuple(np.bincount(stores_of(batch))) for batch in rows} == {(12, 4)}


def test_a_store_is_passed_through_whole_before_it_repeats():
    plan = make()
    # 130 cells at 4 a batch: 32 batches a pass, 2 cells left out of each
    small = [r[stores_of(r) == 1] for r in plan.rows(0, 0, plan.batches_per_epoch)]
    assert plan.batches_per_epoch == 700 // 12 == 58
    seen = np.concatenate(small)
    assert len(np.unique(seen)) == len(seen)  # a second pass has ids of its own
    window = plan.window_batches
    assert window == 16
    first = without_repeats(np.concatenate(small[:32]))
    assert len(np.unique(first)) == 128


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(40, 400), st.integers(40, 400), st.integers(40, 400)),
    seed=st.integers(0, 3),
    begin=st.integers(0, 90),
    count=st.integers(0, 30),
    lengths=st.booleans(),
    world=st.sampled_from([1, 2, 4, 8]),
)
def test_any_piece_on_any_number_of_workers_is_the_piece_of_the_whole(
    sizes, seed, begin, count, lengths, world
):
    plan = make(sizes, weights=(2, 1, 1), seed=seed, lengths=lengths)
    epoch, first = divmod(begin, plan.batches_per_epoch)
    last = min(first + count, plan.batches_per_epoch)
    whole = plan.rows(epoch, 0, plan.batches_per_epoch)[first:last]
    parts = [plan.rows(epoch, first, last, rank=r, world=world) for r in range(world)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


def test_bucketing_holds_across_stores():
    spread = {}
    for bucketed in (True, False):
        plan = make((4000, 4000), weights=(1, 1), lengths=bucketed)
        nnz = [np.random.default_rng(i).integers(1, 999, 4000) for i in range(2)]
        rows = plan.rows(0, 0, 200)
        which, where = stores_of(rows), rows & 0xFFFFF
        sizes = np.where(which == 0, nnz[0][where], nnz[1][where])
        spread[bucketed] = sizes.std(axis=1).mean()
    assert spread[True] < 0.4 * spread[False]


def test_lanes_are_dealt_by_weight_and_well_mixed():
    dealt = deal_lanes([0.5, 0.25, 0.25], 16)
    assert np.bincount(dealt).tolist() == [8, 4, 4]
    for half in dealt.reshape(2, 8):  # two ranks see the same mixture
        assert np.bincount(half).tolist() == [4, 2, 2]


def test_a_weight_too_small_for_a_lane():
    with pytest.raises(ConfigError, match=r"0.01 of 1.01 is less than one of the 8 lanes"):
        deal_lanes([1, 0.01], 8)


def test_a_weight_must_be_positive():
    with pytest.raises(ConfigError, match="every weight must be above 0"):
        deal_lanes([1, 0], 8)
