import numpy as np
import pytest
from cells_by_hand import make_counts
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from cellray.core.errors import DataError
from cellray.data.sketch import (
    MAX_GENES,
    MAX_RELATIVE_ERROR,
    Sketch,
    StoredSketch,
    merge,
    merged_shards,
    quantile,
    sketch_counts,
)

COUNTS = sparse.csr_matrix(make_counts(200, 30, seed=5) ** 3)
FIELDS = ("keys", "counts")
SIZES = np.asarray(COUNTS.sum(axis=1)).ravel()


def sketch(rows):
    part = COUNTS[rows]
    return sketch_counts(part.indptr, part.indices, part.data, SIZES[rows])


def exact(matrix, sizes, q=0.5):
    values = matrix.toarray() / np.maximum(sizes, 1)[:, None] * 1e4
    found = np.ones(matrix.shape[1])
    for g in range(matrix.shape[1]):
        column = values[:, g][values[:, g] > 0]
        if len(column):
            found[g] = np.quantile(column, q, method="lower") if q != 0.5 else np.median(column)
    return found


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=200, max_size=200), st.permutations(range(5)), st.data()
)
def test_any_division_and_any_order_of_merging_give_the_same_bytes(part_of, order, data):
    part_of = np.array(part_of)
    parts = [sketch(np.flatnonzero(part_of == p)) for p in order]
    while len(parts) > 1:
        i = data.draw(st.integers(0, len(parts) - 2))
        parts[i : i + 2] = [merge(parts[i : i + 2])]
    assert parts[0].to_bytes() == sketch(np.arange(200)).to_bytes()
    assert parts[0].counts.sum() == COUNTS.nnz


@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_quantiles_are_within_the_bound(q):
    found = quantile(sketch(np.arange(200)), 31, q=q)
    wanted = exact(sparse.hstack([COUNTS, sparse.csr_matrix((200, 1))]).tocsr(), SIZES, q)
    assert (np.abs(found - wanted) <= MAX_RELATIVE_ERROR * wanted * (1 + 1e-6)).all()
    assert found[30] == 1.0
    assert MAX_RELATIVE_ERROR < 0.004


def test_extreme_values_keep_the_bound():
    values = np.array([1, 3, 1 << 24], np.float32)
    sizes = np.array([2.5e9, 7e8, 1 << 24])
    whole = sketch_counts(np.arange(4), np.arange(3), values, sizes)
    wanted = values / sizes * 1e4
    assert (np.abs(quantile(whole, 3) / wanted - 1) <= MAX_RELATIVE_ERROR * (1 + 1e-6)).all()


def test_a_sketch_survives_being_taken_apart():
    whole = sketch(np.arange(200))
    order = np.random.default_rng(0).permutation(len(whole.keys))
    again = Sketch.of(whole.genes[order], whole.buckets[order], whole.counts[order])
    assert again.to_bytes() == whole.to_bytes()
    assert merge([]).to_bytes() == Sketch().to_bytes() == b""


def test_too_many_features_are_refused():
    with pytest.raises(DataError, match=r"more than 1,048,576 features is not supported"):
        sketch_counts(np.array([0, 1]), np.array([MAX_GENES]), np.ones(1, np.float32), np.ones(1))


def test_stored_sketches_merge_shard_by_shard_to_the_same(tmp_path):
    rng = np.random.default_rng(4)
    sketches = []
    for number, top in enumerate((1, 600, 5000, 0, 1700)):
        keys = np.unique(rng.integers(0, max(top, 1) << 12, 3000 if top else 0, dtype=np.uint32))
        sketches.append(Sketch(keys, rng.integers(1, 9, len(keys), dtype=np.uint32)))
        (tmp_path / str(number)).mkdir()
        StoredSketch.write(tmp_path / str(number), sketches[-1])
    stored = [StoredSketch(tmp_path / str(n)) for n in range(5)]
    assert [s.num_shards for s in stored] == [s.num_shards for s in sketches] == [1, 2, 10, 0, 4]
    whole = merge(sketches)
    for origin in (stored, [*sketches[:2], *stored[2:]]):
        shards = list(merged_shards(origin))
        assert len(shards) == 10
        assert all((s.genes // 512 == i).all() for i, s in enumerate(shards))
        joined = Sketch(*(np.concatenate([getattr(s, n) for s in shards]) for n in FIELDS))
        assert joined.to_bytes() == whole.to_bytes()
    assert list(merged_shards([])) == []
