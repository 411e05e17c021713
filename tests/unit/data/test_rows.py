"""From triples to rows: any order of chunks and genes, foreign genes, repeats, too many counts."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.core.errors import DataError
from cellray.data import rows as module
from cellray.data.rows import RowGatherer

MAP = np.array([3, -1, 0, 2, -1, 1], dtype=np.int32)  # genes 1 and 4 are not in the vocabulary


def gather(joinids, triples, cuts=()):
    gatherer = RowGatherer(np.array(joinids), MAP)
    arrays = [np.array([t[i] for t in triples], dtype=d) for i, d in enumerate(("i8", "i8", "f4"))]
    bounds = [0, *sorted(cuts), len(triples)]
    for first, last in pairwise(bounds):
        gatherer.add(*(a[first:last] for a in arrays))
    return gatherer.rows()


def slow(joinids, triples):
    """The same with a dense matrix."""
    dense = np.zeros((len(joinids), 4))
    sizes = np.zeros(len(joinids))
    for joinid, gene, count in triples:
        row = joinids.index(joinid)
        sizes[row] += count
        if MAP[gene] >= 0:
            dense[row, MAP[gene]] += count
    return dense, sizes


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_rows_equal_a_dense_matrix_whatever_the_order_and_the_chunks(data):
    joinids = data.draw(st.permutations([5, 90, 7, 1 << 35]))
    triples = data.draw(
        st.lists(
            st.tuples(st.sampled_from(joinids), st.integers(0, 5), st.integers(1, 9)), max_size=30
        )
    )
    if data.draw(st.booleans()):  # the store's own order, as is usual: nothing has to be moved
        triples.sort(key=lambda t: (joinids.index(t[0]), MAP[t[1]]))
    cuts = data.draw(st.lists(st.integers(0, len(triples)), max_size=4))
    indptr, genes, counts, sizes = gather(joinids, triples, cuts)
    dense, expected = slow(joinids, triples)
    found = np.zeros_like(dense)
    for row in range(4):
        part = slice(indptr[row], indptr[row + 1])
        assert (np.diff(genes[part]) > 0).all()
        found[row, genes[part]] = counts[part]
    assert np.array_equal(found, dense)
    assert np.array_equal(sizes, expected)


def test_zeros_are_dropped_and_integers_are_counts():
    gatherer = RowGatherer(np.array([4]), MAP)
    gatherer.add(np.array([4, 4]), np.array([2, 3]), np.array([0, 6], dtype=np.int64))
    indptr, genes, counts, sizes = gatherer.rows()
    assert (indptr.tolist(), genes.tolist(), counts.tolist()) == ([0, 1], [2], [6.0])
    assert sizes.tolist() == [6.0]


def test_a_gene_added_after_the_store_was_opened_counts_to_the_library_size_only():
    indptr, _, _, sizes = gather([1], [(1, 2, 5)])
    gatherer = RowGatherer(np.array([1]), MAP[:3])
    gatherer.add(np.array([1, 1]), np.array([2, 5]), np.array([5, 8], dtype=np.float32))
    assert gatherer.rows()[0].tolist() == indptr.tolist()
    assert sizes.tolist() == [5.0]


def test_a_block_beyond_32_bit_offsets_is_refused(monkeypatch):
    monkeypatch.setattr(module, "_MAX_COUNTS", 3)
    with pytest.raises(DataError, match=r"a block of 1 cells holds more than 3 counts, .*fewer"):
        gather([1], [(1, 0, 1), (1, 2, 1), (1, 3, 1), (1, 5, 1)])
