"""Cell ids: three numbers in one, the plain joinid where there is one store."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cellray.core.ids import MAX_REPEATS, MAX_STORES, cell_ids, joinids_of, stores_of
from cellray.core.ids import without_repeats as plain


@given(
    st.integers(0, (1 << 40) - 1), st.integers(0, MAX_STORES - 1), st.integers(0, MAX_REPEATS - 1)
)
def test_the_parts_come_back(joinid, store, repeat):
    ids = cell_ids(np.array([joinid]), store=store, repeats=np.array([repeat]))
    assert ids[0] >= 0
    assert joinids_of(ids).tolist() == [joinid]
    assert stores_of(ids).tolist() == [store]
    assert plain(ids).tolist() == cell_ids(np.array([joinid]), store=store).tolist()


def test_with_one_store_an_id_is_the_joinid():
    joinids = np.array([0, 7, 10**9])
    assert np.array_equal(cell_ids(joinids), joinids)
