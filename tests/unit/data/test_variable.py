"""Variable genes: moments that add up over blocks, scores against a slow plain reference."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from cells_by_hand import make_counts
from scipy import sparse

from cellray.core.blocks import CellBlock
from cellray.core.errors import DataError
from cellray.data.variable import GeneMoments, choose_variable, choose_variable_by_batch


def block_of(counts: np.ndarray, *, library_sizes: np.ndarray | None = None) -> CellBlock:
    matrix = sparse.csr_matrix(counts, dtype=np.float32)
    sizes = counts.sum(axis=1) if library_sizes is None else library_sizes
    return CellBlock(
        joinids=np.arange(len(counts), dtype=np.int64),
        indptr=matrix.indptr.astype(np.int64),
        genes=matrix.indices.astype(np.int32),
        counts=matrix.data,
        library_sizes=sizes.astype(np.float32),
    )


def slow_choice(counts: np.ndarray, num_genes: int, min_cells: int) -> list[int]:
    """Gene by gene with Python's own statistics; bins by counting edges at or below the mean."""
    scaled = [[1e4 * c / sum(cell) if sum(cell) else 0.0 for c in cell] for cell in counts.tolist()]
    columns = list(zip(*scaled, strict=True))
    detected = [sum(value > 0 for value in column) for column in columns]
    usable = [
        g
        for g, column in enumerate(columns)
        if detected[g] >= min_cells and statistics.variance(column) > 0
    ]
    means = [statistics.fmean(columns[g]) for g in usable]
    spread = [
        math.log(statistics.variance(columns[g]) / statistics.fmean(columns[g])) for g in usable
    ]
    edges = np.quantile(means, [i / 20 for i in range(1, 20)])
    bins = [sum(edge <= mean for edge in edges) for mean in means]
    score = []
    for value, where in zip(spread, bins, strict=True):
        near = [v for v, b in zip(spread, bins, strict=True) if b == where]
        centre = statistics.median(near)
        mad = statistics.median([abs(v - centre) for v in near])
        score.append((value - centre) / (mad or 1.0))
    best = sorted(range(len(usable)), key=lambda i: (-score[i], i))[:num_genes]
    return sorted(usable[i] for i in best)


def test_moments_by_hand() -> None:
    counts = np.array([[1, 3, 0], [0, 0, 0], [0, 5, 5]], dtype=np.float32)
    for found in (
        GeneMoments.of_counts(sparse.csr_matrix(counts), target_sum=8),
        GeneMoments.of_block(block_of(counts), 3, target_sum=8),
    ):
        assert found.total.tolist() == [2, 6 + 4, 4]
        assert found.square.tolist() == [4, 36 + 16, 16]
        assert found.detected.tolist() == [1, 2, 1]
        assert found.num_cells == 3


def test_a_block_is_scaled_by_its_own_library_sizes() -> None:
    """Library sizes may hold counts of genes that the vocabulary lacks."""
    block = block_of(np.array([[1, 3]]), library_sizes=np.array([8.0]))
    assert GeneMoments.of_block(block, 2, target_sum=8).total.tolist() == [1, 3]


def test_a_stored_zero_is_no_detection() -> None:
    counts = sparse.csr_matrix(np.array([[1, 2], [3, 4]], dtype=np.float32))
    counts.data[1] = 0
    assert GeneMoments.of_counts(counts).detected.tolist() == [2, 1]


@pytest.mark.parametrize("cells_per_block", [1, 7, 64, 1000])
def test_moments_over_blocks_equal_the_whole(cells_per_block: int) -> None:
    counts = make_counts(150, 80, seed=1)
    whole = GeneMoments.of_counts(sparse.csr_matrix(counts))
    parts = [
        GeneMoments.of_block(block_of(counts[i : i + cells_per_block]), 80)
        for i in range(0, 150, cells_per_block)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    assert merged.num_cells == whole.num_cells == 150
    np.testing.assert_array_equal(merged.detected, whole.detected)
    np.testing.assert_allclose(merged.total, whole.total, rtol=1e-12)
    np.testing.assert_allclose(merged.square, whole.square, rtol=1e-12)
    np.testing.assert_array_equal(
        choose_variable(merged, num_genes=20), choose_variable(whole, num_genes=20)
    )


@pytest.mark.parametrize("seed", range(5))
def test_choice_equals_a_slow_reference(seed: int) -> None:
    counts = make_counts(60, 90, seed=seed)
    counts[3] = 0  # a cell without counts
    counts[:, 5] = 0
    counts[:2, 5] = 9  # detected in too few cells
    found = choose_variable(GeneMoments.of_counts(sparse.csr_matrix(counts)), num_genes=25)
    assert found.dtype == np.int64
    assert found.tolist() == slow_choice(counts, 25, 3)
    assert 5 not in found


def test_the_choice_ignores_the_order_of_cells_and_follows_the_genes() -> None:
    counts = make_counts(100, 70, seed=3)
    found = choose_variable(GeneMoments.of_counts(sparse.csr_matrix(counts)), num_genes=15)
    turned = sparse.csr_matrix(counts[::-1, ::-1])
    again = choose_variable(GeneMoments.of_counts(turned), num_genes=15)
    assert found.tolist() == sorted((69 - again).tolist())


def test_a_gene_that_stands_out_is_chosen_and_ties_go_to_the_lower_position() -> None:
    squares = np.array([30.0, 30, 30, 30, 90, 30])
    moments = GeneMoments(np.full(6, 10.0), squares, np.full(6, 5), num_cells=10)
    assert choose_variable(moments, num_genes=1).tolist() == [4]
    assert choose_variable(moments, num_genes=3).tolist() == [0, 1, 4]
    assert choose_variable(moments, num_genes=99).tolist() == list(range(6))


def test_fewer_cells_than_min_cells_ask_for_all_of_them() -> None:
    counts = np.array([[1, 8, 1], [1, 2, 0]], dtype=np.float32)
    moments = GeneMoments.of_counts(sparse.csr_matrix(counts))
    assert choose_variable(moments, num_genes=3, min_cells=5).tolist() == [0, 1]


@pytest.mark.parametrize("num_cells", [0, 1, 5])
def test_nothing_varies(num_cells: int) -> None:
    counts = sparse.csr_matrix(np.ones((num_cells, 3), dtype=np.float32))
    with pytest.raises(
        DataError,
        match=rf"no gene varies among the {num_cells} training cells \(detected in at least 2\); "
        "train on more cells or lower min_cells",
    ):
        choose_variable(GeneMoments.of_counts(counts), num_genes=2, min_cells=2)


def test_real_pancreas_genes_are_pinned(repository: Path) -> None:
    """The same genes from blocks (vocabulary) and a matrix (baselines), known markers on top."""
    cells = ad.read_h5ad(repository / "tests/data/pancreas/human2.h5ad")
    counts = sparse.csr_matrix(cells.X, dtype=np.float32)
    whole = GeneMoments.of_counts(counts)
    blocks = [block_of(counts[i : i + 100].toarray()) for i in range(0, counts.shape[0], 100)]
    merged = GeneMoments.of_block(blocks[0], counts.shape[1])
    for block in blocks[1:]:
        merged = merged + GeneMoments.of_block(block, counts.shape[1])
    found = choose_variable(whole, num_genes=200)
    np.testing.assert_array_equal(found, choose_variable(merged, num_genes=200))
    names = set(cells.var_names[found])
    assert {"INS", "GCG", "SST", "PPY", "REG1A", "PRSS1"} <= names


def test_the_flavor_of_seurat_by_hand() -> None:
    """A gene alone in its interval scores 1, equal ones 0, others by mean and deviation."""
    means = np.array([0.1, 0.1, 0.1, 0.1, 900.0, 30.0, 30.0])
    ratios = np.exp([1.0, 2.0, 3.0, 9.0, 7.0, 2.0, 2.0])  # variance / mean
    num = 11
    squares = ((num - 1) * means * ratios + num * means**2).astype(np.float64)
    moments = GeneMoments(means * num, squares, np.full(7, num), num_cells=num)
    best = [choose_variable(moments, num_genes=k, flavor="seurat").tolist() for k in (1, 2, 4)]
    # scores -.77, -.49, -.21, 1.46; 1; 0, 0
    assert best == [[3], [3, 4], [3, 4, 5, 6]]


def test_genes_are_chosen_within_batches() -> None:
    """A gene that differs between batches alone is chosen by the pool and by no batch."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(2.0, 1.0, 600), (300, 600)).astype(float)
    batch = np.arange(300) % 3
    counts[:, 7] = np.where(batch == 0, 60, 2)
    counts[:, 9] = np.where(np.arange(300) % 2 == 0, 0, 40)  # varies within every batch
    per_batch = [GeneMoments.of_counts(sparse.csr_matrix(counts[batch == b])) for b in range(3)]
    pooled = per_batch[0] + per_batch[1] + per_batch[2]
    assert choose_variable(pooled, num_genes=2).tolist() == [7, 9]
    within = choose_variable_by_batch(per_batch, num_genes=5)
    assert 9 in within
    assert 7 not in within


def test_batches_vote_by_median_rank() -> None:
    """The choice by scanpy's rule, written out with pandas."""
    batches = [
        GeneMoments.of_counts(sparse.csr_matrix(make_counts(80, 70, seed=seed)))
        for seed in range(4)
    ]
    num = 12
    ranks = pd.DataFrame(index=range(70), columns=range(4), dtype=float)
    for column, moments in enumerate(batches):
        before: set[int] = set()
        for k in range(1, num + 1):
            best = set(choose_variable(moments, num_genes=k).tolist())
            (added,) = best - before
            ranks.loc[added, column], before = k, best
    table = pd.DataFrame({"rank": ranks.median(axis=1), "votes": -ranks.notna().sum(axis=1)})
    table["position"] = table.index
    expected = table.dropna().sort_values(["rank", "votes", "position"]).index[:num]
    found = choose_variable_by_batch(batches, num_genes=num)
    assert found.tolist() == sorted(expected)


def test_one_batch_is_the_plain_choice_and_still_batches_are_refused() -> None:
    moments = GeneMoments.of_counts(sparse.csr_matrix(make_counts(60, 40, seed=2)))
    one = choose_variable_by_batch([moments], num_genes=9)
    assert one.tolist() == choose_variable(moments, num_genes=9).tolist()
    still = GeneMoments.of_counts(sparse.csr_matrix(np.ones((5, 4))))
    with pytest.raises(DataError, match="no gene varies among the 10 training cells"):
        choose_variable_by_batch([still, still], num_genes=2)
