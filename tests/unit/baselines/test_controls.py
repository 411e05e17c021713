"""Controls: what they draw, that it hangs on nothing but counts and seed, what they score."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from cells_for_baselines import made_cells
from scipy import sparse, stats

from cellray.baselines._chance import cell_keys, normals
from cellray.baselines.base import CellCounts, Labelled, annotate_with, baseline, embed_with
from cellray.baselines.celltype_jitter import CelltypeJitterConfig
from cellray.metrics.silhouette import asw_label, silhouette_widths

I64 = npt.NDArray[np.int64]


def labels_by(name: str, train: CellCounts, labels: I64, query: CellCounts, seed: int) -> Labelled:
    unit = baseline(name)
    return annotate_with(unit, unit.config(name=name), train, labels, query, seed)


def test_a_hash_of_counts_that_order_zeros_and_company_do_not_touch() -> None:
    counts, _ = made_cells(400)
    keys = cell_keys(counts)
    assert len(np.unique(keys)) == 400
    np.testing.assert_array_equal(cell_keys(counts[17:31]), keys[17:31])
    padded = counts.copy()
    padded.data[:5] = 0
    dropped = padded.copy()
    dropped.eliminate_zeros()
    np.testing.assert_array_equal(cell_keys(padded), cell_keys(dropped))
    turned = sparse.csr_matrix(counts.toarray()[:, ::-1])[:, ::-1]  # indices in falling order
    np.testing.assert_array_equal(cell_keys(turned), keys)
    one, other = counts[:1].copy(), counts[:1].copy()
    other.data[0] += 1
    assert cell_keys(one)[0] != cell_keys(other)[0]
    assert cell_keys(sparse.csr_matrix((2, 9), dtype=np.float32)).shape == (2,)


def test_noise_is_standard_normal_and_independent() -> None:
    counts, labels = made_cells(2000)
    noise = normals(counts, "noise", 3, 5)
    assert noise.dtype == np.float32
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(noise.T) - np.eye(5)).max() < 0.1
    assert stats.f_oneway(*(noise[labels == c, 0] for c in range(3))).pvalue > 1e-3
    assert (normals(counts, "noise", 4, 5) != noise).all()


def test_noise_is_the_seeds_and_of_the_width_asked_for() -> None:
    counts, _ = made_cells(30)
    unit = baseline("noise")
    first, again, other = (
        embed_with(unit, unit.config(name="noise"), CellCounts(counts), seed) for seed in (1, 1, 2)
    )
    assert first.shape == (30, 50)
    assert first.tobytes() == again.tobytes()
    assert (first != other).all()


def test_jitter_keeps_types_apart_and_cells_too() -> None:
    counts, labels = made_cells(90)
    unit = baseline("celltype_jitter")
    codes = labels * 7 + 2  # whatever the codes are
    found = embed_with(unit, unit.config(name=unit.name), CellCounts(counts), 0, truth=codes)
    assert found.shape == (90, 3)
    assert len(np.unique(found, axis=0)) == 90
    np.testing.assert_array_equal(found.argmax(axis=1), labels)
    np.testing.assert_allclose(found - np.eye(3)[labels], 0, atol=0.05 * 5)
    widths = silhouette_widths(found.astype(np.float64), labels)
    assert asw_label(widths) > 0.95
    wide = embed_with(unit, CelltypeJitterConfig(jitter=5.0), CellCounts(counts), 0, truth=codes)
    assert asw_label(silhouette_widths(wide.astype(np.float64), labels)) < 0.6


def test_shuffled_labels_come_as_often_as_in_training_and_know_nothing() -> None:
    counts, truth = made_cells(3000, num_genes=40)
    labels = np.repeat([0, 2, 3], [1800, 900, 300]).astype(np.int64)
    found = labels_by("shuffled_labels", CellCounts(counts), labels, CellCounts(counts), 1)
    shares = np.bincount(found.codes, minlength=4) / 3000
    np.testing.assert_allclose(shares, [0.6, 0, 0.3, 0.1], atol=0.03)
    assert found.confidence is not None
    np.testing.assert_array_equal(found.confidence, np.array([0.6, 0, 0.3, 0.1])[found.codes])
    table = np.zeros((3, 4))
    np.add.at(table, (truth, found.codes), 1)
    assert stats.chi2_contingency(table[:, [0, 2, 3]]).pvalue > 1e-3
    other = labels_by("shuffled_labels", CellCounts(counts), labels, CellCounts(counts), 2)
    assert 0.3 < (other.codes == found.codes).mean() < 0.6  # 0.46 by chance


def test_batch_only_knows_the_batch_and_nothing_else() -> None:
    counts, _ = made_cells(10)
    train = CellCounts(counts, np.array([0, 0, 0, 1, 1, 1, 3, 3, 3, 3]))
    labels = np.array([2, 2, 0, 1, 1, 1, 2, 0, 0, 2], dtype=np.int64)
    query = CellCounts(counts[:5], np.array([1, 0, 3, 2, 9]))
    found = labels_by("batch_only", train, labels, query, 0)
    assert found.codes.tolist() == [1, 2, 0, 2, 2]  # a tie to the first; unseen: the majority
    np.testing.assert_allclose(found.confidence, [1, 2 / 3, 1 / 2, 4 / 10, 4 / 10])
    emptied = CellCounts(sparse.csr_matrix(counts.shape, dtype=np.float32), train.batches)
    again = labels_by("batch_only", emptied, labels, CellCounts(counts[5:], query.batches), 5)
    np.testing.assert_array_equal(again.codes, found.codes)


@pytest.mark.parametrize("name", ["shuffled_labels", "batch_only"])
def test_label_controls_answer_each_cell_by_itself(name: str) -> None:
    counts, labels = made_cells(80)
    cells = CellCounts(counts, np.arange(80, dtype=np.int64) % 3)
    together = labels_by(name, cells, labels, cells, 0)
    order = np.random.default_rng(0).permutation(80)
    moved = labels_by(name, cells, labels, cells.rows(order), 0)
    np.testing.assert_array_equal(moved.codes, together.codes[order])
    some = labels_by(name, cells, labels, cells.rows(np.arange(3)), 0)
    np.testing.assert_array_equal(some.codes, together.codes[:3])
