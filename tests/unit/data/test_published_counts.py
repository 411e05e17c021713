"""Counts recovered from published matrices: exactly those that went in, or none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from cellray.data.published_counts import recover_counts


def counts_of(num_cells=120, num_genes=80, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.negative_binomial(0.4, 0.03, (num_cells, num_genes)).astype(np.float64)
    counts[:, 0] += 2
    counts[:, 1] = 1
    return counts


def csr(matrix):
    return sparse.csr_matrix(np.asarray(matrix, dtype=np.float32))


@pytest.mark.parametrize(("base", "name"), [(np.e, "log1p (base e)"), (2.0, "log1p (base 2)")])
def test_log_normalised_values_give_their_counts_back(base, name):
    counts = counts_of()
    unseen = np.random.default_rng(1).uniform(0, 3000, (len(counts), 1))  # genes left out before
    normalised = np.log1p(counts / (counts.sum(1, keepdims=True) + unseen) * 1e4) / np.log(base)
    found = recover_counts(csr(normalised))
    assert found.exact.all()
    assert found.how == {name: len(counts)}
    np.testing.assert_array_equal(found.counts.toarray(), counts)


def test_a_cell_whose_smallest_count_is_not_one():
    counts = np.array([[2, 3, 0, 7], [5, 0, 8, 13], [2, 4, 6, 0]], dtype=float)
    found = recover_counts(csr(np.log1p(counts * 0.37)))
    np.testing.assert_array_equal(found.counts.toarray()[:2], counts[:2])
    np.testing.assert_array_equal(found.counts.toarray()[2], counts[2] / 2)  # divisor 2 is lost


def test_counts_are_taken_as_they_are_and_collisions_are_undone():
    counts = np.minimum(counts_of(), 250)
    assert recover_counts(csr(counts)).how == {"counts": len(counts)}
    found = recover_counts(csr(-256 * np.log1p(-counts / 256)))
    assert found.how == {"UMI correction (K = 256)": len(counts)}
    np.testing.assert_array_equal(found.counts.toarray(), counts)


@pytest.mark.parametrize("kind", ["scaled", "tpm", "negative", "root", "missing"])
def test_what_gives_no_whole_counts_is_not_believed(kind):
    rng = np.random.default_rng(2)
    counts = counts_of()
    length = rng.uniform(0.3, 4.0, counts.shape[1])
    values = {
        "scaled": counts * rng.uniform(0.5, 2.0, counts.shape[1]),
        "tpm": np.log1p(counts / length / (counts / length).sum(1, keepdims=True) * 1e6),
        "negative": counts - 0.5,
        "root": np.sqrt(counts),
        "missing": np.where(counts > 5, np.nan, counts),
    }[kind]
    found = recover_counts(csr(values))
    assert found.exact.mean() < 0.05
    assert found.counts[~found.exact].nnz == 0


def test_cells_are_judged_one_by_one_and_one_value_proves_nothing():
    mixed = counts_of(4)
    mixed[1] *= 1.37
    mixed[2, 3:] = 0
    mixed[3] = 0
    mixed[3, 5] = 0.7  # a single value
    found = recover_counts(csr(mixed))
    assert found.exact.tolist() == [True, False, True, False]
    np.testing.assert_array_equal(found.counts.toarray()[[0, 2]], mixed[[0, 2]])
    empty = recover_counts(csr(np.zeros((2, 3))))
    assert empty.exact.all()
    assert empty.counts.nnz == 0
