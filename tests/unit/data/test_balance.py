"""Balanced sampling: equal groups, limited repeats, other copies each epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.core.draw import Draw
from cellray.core.ids import joinids_of, without_repeats
from cellray.data.balance import Balance, quotas
from cellray.data.plan import EpochPlan

SIZES = np.array([900, 90, 9, 1])


def make(**keys):
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(4), SIZES))
    plan = EpochPlan(
        joinids=np.arange(1000, dtype=np.int64),
        lengths=None,
        seed=0,
        cells_global=20,
        lanes=20,
        run_cells=8,
        window_batches=16,
        balance=Balance(groups, **keys),
    )
    return plan, groups


@given(st.lists(st.integers(1, 500), min_size=1, max_size=9), st.integers(1, 12))
@settings(deadline=None)
def test_quotas_keep_the_number_of_cells_and_the_limit(sizes, most):
    given_sizes = np.array(sizes)
    found = quotas(given_sizes, max_repeats=most)
    assert found.sum() == given_sizes.sum()
    assert (found <= most * given_sizes).all()
    free = found[found < most * given_sizes]
    assert len(free) == 0 or free.max() - free.min() <= 1


def test_groups_are_equally_frequent_where_the_limit_allows():
    plan, groups = make(max_repeats=10)
    seen = groups[joinids_of(plan.rows(0, 0, 50))].reshape(-1)
    assert np.bincount(seen).tolist() == [450, 450, 90, 10]


def test_no_copy_comes_twice_and_no_cell_more_often_than_allowed():
    plan, _ = make(max_repeats=10)
    rows = plan.rows(3, 0, 50).reshape(-1)
    assert len(np.unique(rows)) == 1000
    assert np.bincount(without_repeats(rows)).max() == 10


def test_the_frequent_group_shows_other_cells_each_epoch():
    plan, groups = make()
    seen = [set(without_repeats(plan.rows(e, 0, 50)).reshape(-1)) for e in range(2)]
    common = {c for c in seen[0] & seen[1] if groups[c] == 0}
    assert 180 < len(common) < 270  # 450 of 900, twice: 225 expected


def test_copies_of_a_cell_lie_far_apart():
    """Copies are not neighbours in the order, so a batch does not repeat one cell."""
    plan, _ = make()
    rows = without_repeats(plan.rows(0, 0, 50))
    repeats = [20 - len(np.unique(batch)) for batch in rows]
    assert np.mean(repeats) < 1.5


def test_ranks_share_a_balanced_batch_like_any_other():
    plan, _ = make()
    parts = [plan.rows(1, 3, 9, rank=r, world=4) for r in range(4)]
    assert np.array_equal(np.concatenate(parts, axis=1), plan.rows(1, 3, 9))


def test_balance_is_a_function_of_the_draw():
    groups = np.repeat(np.arange(4), SIZES)
    ids = np.arange(1000)
    one, two, other = (Balance(groups).cells(ids, Draw(0, e)) for e in (0, 0, 1))
    assert np.array_equal(one[0], two[0])
    assert not np.array_equal(one[0], other[0])
    assert one[1].max() == pytest.approx(9)
