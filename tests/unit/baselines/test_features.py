"""Shared features: normalisation and choice of genes by formula, components against SVD."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from cells_for_baselines import made_cells
from scipy import sparse

from cellray.baselines._features import (
    FeatureConfig,
    fit_components,
    fit_genes,
    log_normalise,
)
from cellray.core.errors import DataError


def chosen(counts: sparse.csr_matrix, *, num_genes: int, min_cells: int = 3) -> list[int]:
    config = FeatureConfig(name="x", num_genes=num_genes, min_cells=min_cells)
    return fit_genes(counts, config).genes.tolist()


def test_log_normalise_golden() -> None:
    counts = sparse.csr_matrix(np.array([[1, 3, 0], [0, 0, 0], [0, 0, 5]], dtype=np.float32))
    expected = np.log1p([[2500, 7500, 0], [0, 0, 0], [0, 0, 10_000]])
    np.testing.assert_allclose(log_normalise(counts).toarray(), expected, rtol=1e-12)
    assert counts.toarray()[0].tolist() == [1, 3, 0]  # the input is left alone


def test_variable_genes_are_those_that_differ_between_types() -> None:
    counts, _ = made_cells(300, num_genes=1500)
    genes = chosen(counts, num_genes=300)
    assert genes == sorted(genes)
    assert len(set(genes) & set(range(30))) >= 27


def test_gene_choice_is_a_slow_obvious_reference() -> None:
    counts, _ = made_cells(90, num_genes=60)
    dense = counts.toarray().astype(np.float64)
    scaled = dense / dense.sum(axis=1, keepdims=True) * 1e4
    mean, variance = scaled.mean(axis=0), scaled.var(axis=0, ddof=1)
    usable = [g for g in range(60) if (dense[:, g] > 0).sum() >= 3 and variance[g] > 0]
    ratio = np.log(variance[usable] / mean[usable])
    score = (
        pd.Series(ratio)
        .groupby(pd.cut(np.log1p(mean[usable]), 20), observed=True)
        .transform(lambda near: (near - near.mean()) / near.std() if len(near) > 1 else 1.0)
    )
    best = sorted(range(len(usable)), key=lambda i: (-score[i], i))[:20]
    expected = sorted(usable[i] for i in best)
    assert chosen(counts, num_genes=20) == expected


def test_rare_genes_are_no_candidates() -> None:
    counts = np.ones((20, 4), dtype=np.float32)
    counts[:10, 0] = 5
    counts[:, 1] = 0
    counts[:2, 1] = 50  # in two cells only
    genes = chosen(sparse.csr_matrix(counts), num_genes=4, min_cells=3)
    assert 1 not in genes
    assert 0 in genes


def test_scaled_genes_have_unit_deviation_and_are_clipped() -> None:
    counts, _ = made_cells()
    features = fit_genes(counts, FeatureConfig(name="x", num_genes=25))
    scaled = features.scaled(counts)
    assert scaled.shape == (150, 25)
    assert scaled.dtype == np.float32
    assert scaled.max() <= 10
    inside = scaled.toarray().max(axis=0) < 10
    np.testing.assert_allclose(scaled.toarray().std(axis=0, ddof=1)[inside], 1, rtol=1e-4)
    plain = log_normalise(counts)[:, features.genes].toarray()
    np.testing.assert_allclose(features.apply(counts).toarray(), plain, rtol=1e-6)


@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize("source", ["made", "pancreas"])
def test_genes_and_components_are_what_scanpy_does_unless_told_otherwise(
    source: str, batches: bool, repository: Path
) -> None:
    """normalize_total, log1p, highly_variable_genes (with a batch_key or without) and pca."""
    sc = pytest.importorskip("scanpy")
    if source == "made":
        counts, _ = made_cells(200, num_genes=400)
        num = 80
    else:
        cells = ad.read_h5ad(repository / "tests/data/pancreas/human2.h5ad")
        counts, num = sparse.csr_matrix(cells.X, dtype=np.float32), 2000
    kept = np.flatnonzero(np.asarray((counts > 0).sum(axis=0)).ravel() >= 3)  # pp.filter_genes
    theirs = ad.AnnData(sparse.csr_matrix(counts[:, kept], dtype=np.float64))
    theirs.obs["size"] = np.asarray(counts.sum(axis=1)).ravel()
    theirs.X = sparse.csr_matrix(theirs.X.multiply(1e4 / theirs.obs["size"].to_numpy()[:, None]))
    sc.pp.log1p(theirs)
    codes = np.arange(counts.shape[0]) * 3 // counts.shape[0] if batches else None
    if batches:
        theirs.obs["batch"] = pd.Categorical(codes)
    sc.pp.highly_variable_genes(theirs, n_top_genes=num, batch_key="batch" if batches else None)
    features = fit_genes(counts, FeatureConfig(name="x", num_genes=num), codes)
    found = set(kept[theirs.var["highly_variable"].to_numpy()].tolist())
    # scanpy undoes log1p with expm1, and a gene on an edge may round to the other side
    assert len(found ^ set(features.genes.tolist())) <= num // 250
    ours = features.apply(counts)
    expected = sc.pp.pca(ours.toarray().astype(np.float64), n_comps=10, svd_solver="full")
    np.testing.assert_allclose(
        np.abs(fit_components(ours, 10).apply(ours)), np.abs(expected), atol=2e-3
    )


def test_components_agree_with_a_singular_value_decomposition() -> None:
    counts, _ = made_cells()
    scaled = fit_genes(counts, FeatureConfig(name="x", num_genes=30)).apply(counts)
    found = fit_components(scaled, 5)
    dense = scaled.toarray().astype(np.float64)
    left, values, _ = np.linalg.svd(dense - dense.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(found.variance, values[:5] ** 2 / 149, rtol=1e-6)
    coords = found.apply(scaled)
    assert coords.shape == (150, 5)
    np.testing.assert_allclose(np.abs(coords), np.abs(left[:, :5] * values[:5]), atol=1e-4)
    largest = np.abs(found.axes).argmax(axis=0)
    assert (found.axes[largest, np.arange(5)] > 0).all()


def test_components_are_at_most_what_the_cells_span() -> None:
    counts, _ = made_cells(4)
    scaled = fit_genes(counts, FeatureConfig(name="x", num_genes=30, min_cells=1)).apply(counts)
    assert fit_components(scaled, 50).axes.shape[1] == 3


def test_nothing_varies() -> None:
    same = sparse.csr_matrix(np.ones((5, 3), dtype=np.float32))
    with pytest.raises(DataError, match="no gene varies among the 5 training cells"):
        chosen(same, num_genes=2)


def test_batches_of_one_cell_are_taken_as_one() -> None:
    counts, _ = made_cells(60)
    wanted = FeatureConfig(name="x", num_genes=30)
    alone = fit_genes(counts, wanted, np.arange(60))
    np.testing.assert_array_equal(alone.genes, fit_genes(counts, wanted).genes)
