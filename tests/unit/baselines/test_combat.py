"""ComBat against scanpy's pieces and whole, and the algebra that never makes cells dense."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import numpy.typing as npt
import pytest
import scanpy as sc
from scanpy.preprocessing import _combat as theirs
from scipy import sparse
from sklearn.decomposition import PCA

from cellray.baselines.combat import BatchAdjustment, fit_adjustment
from cellray.core.errors import DataError

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


def cells_in_batches(num: int = 160, genes: int = 40) -> tuple[F64, I64]:
    """Sparse positive values with a shift and a spread of each of three batches, by gene."""
    rng = np.random.default_rng(0)
    batches = rng.choice(3, num, p=[0.5, 0.3, 0.2]).astype(np.int64)
    values = rng.gamma(2.0, 1.0, (num, genes)) * rng.lognormal(0, 0.4, (3, genes))[batches]
    values += rng.normal(0, 0.6, (3, genes))[batches].clip(0)
    values[rng.random((num, genes)) < 0.4] = 0
    return values, batches


def corrected(adjustment: BatchAdjustment, values: F64, batches: I64) -> F64:
    return values * adjustment.factor[batches] + adjustment.offset[batches]


def by_scanpys_pieces(values: F64, batches: I64) -> F64:
    """Standardised by hand, shrunk by scanpy's own iteration run to convergence."""
    sizes = np.bincount(batches)
    means = np.array([values[batches == b].mean(axis=0) for b in range(len(sizes))])
    grand = (sizes[:, None] * means).sum(axis=0) / len(values)
    deviation = np.sqrt(((values - means[batches]) ** 2).mean(axis=0))
    standard = (values - grand) / deviation
    result = np.empty_like(values)
    for batch in range(len(sizes)):
        part = standard[batches == batch]
        mean, variance = part.mean(axis=0), part.var(axis=0, ddof=1)
        about, spread = variance.var(ddof=1), variance.mean()
        shift, width = theirs._it_sol(
            part.T,
            mean,
            variance,
            g_bar=mean.mean(),
            t2=mean.var(ddof=1),
            a=(2 * about + spread**2) / about,
            b=(spread * about + spread**3) / about,
            conv=1e-12,
        )
        result[batches == batch] = (part - shift) / np.sqrt(width) * deviation + grand
    return result


def test_corrected_cells_equal_scanpys_iteration() -> None:
    values, batches = cells_in_batches()
    adjustment = fit_adjustment(sparse.csr_matrix(values), batches, 3)
    expected = by_scanpys_pieces(values, batches)
    np.testing.assert_allclose(corrected(adjustment, values, batches), expected, atol=1e-8)


def test_corrected_cells_are_near_scanpys_function() -> None:
    """It stops at 1e-4 and takes one prior's variance over all 40 genes, not 39: digits agree."""
    values, batches = cells_in_batches()
    cells = ad.AnnData(values.copy())
    cells.obs["batch"] = [f"b{b}" for b in batches]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = sc.pp.combat(cells, key="batch", inplace=False)
    adjustment = fit_adjustment(sparse.csr_matrix(values), batches, 3)
    found = corrected(adjustment, values, batches)
    np.testing.assert_allclose(found, expected, atol=1.5e-2)
    assert np.abs(expected - values).max() > 0.5


def test_components_equal_those_of_the_corrected_cells_made_dense() -> None:
    values, batches = cells_in_batches()
    scaled = sparse.csr_matrix(values)
    adjustment = fit_adjustment(scaled, batches, 3)
    components = adjustment.components(scaled, batches, 6)
    ours = adjustment.project(scaled, batches, components)
    pca = PCA(6, svd_solver="full")
    expected = pca.fit_transform(corrected(adjustment, values, batches))
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), atol=1e-5)
    np.testing.assert_allclose(components.variance, pca.explained_variance_, rtol=1e-10)


def test_batches_of_one_cell_and_absent_codes_and_constant_genes() -> None:
    values, batches = cells_in_batches()
    values[:, 3] = batches  # varies between batches only: set to its mean
    values[:, 4] = 2.0
    batches[0] = 4  # a batch of its own; code 3 has no cells
    values[0, 3] = 1.0
    adjustment = fit_adjustment(sparse.csr_matrix(values), batches, 5)
    found = corrected(adjustment, values, batches)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, 3], values[:, 3].mean(), atol=1e-12)
    np.testing.assert_allclose(found[:, 4], 2.0, atol=1e-12)
    varying = np.setdiff1d(np.arange(40), [3, 4])
    np.testing.assert_array_equal(adjustment.factor[4, varying], 1.0)
    np.testing.assert_array_equal(adjustment.factor[3], 1.0)
    np.testing.assert_array_equal(adjustment.offset[3], 0.0)


def test_without_genes_that_vary_within_batches_there_is_nothing_to_fit() -> None:
    batches = np.arange(20, dtype=np.int64) % 2
    values = np.ones((20, 3)) + batches[:, None]
    with pytest.raises(
        DataError, match="'combat' needs genes that vary within batches, and 0 of 3"
    ):
        fit_adjustment(sparse.csr_matrix(values), batches, 2)
