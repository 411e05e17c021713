"""Counts are drawn from the distribution that is promised, not from one that looks like it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from cellray.core.draw import Draw
from cellray.data.digest import cell_hashes, hash64
from cellray.data.synthetic_kernels import alias_table, draw_cells, hash_cells

CELLS = 20_000
SHARES = np.array([0.6, 0.25, 0.1, 0.04, 0.009, 0.001])
LIBRARY = 50.0


def draw(
    shares, *, dispersion: float, dynamic=(), library: float = LIBRARY, cells: int = CELLS
) -> sparse.csr_matrix:
    """Counts of equal cells; genes listed in ``dynamic`` are drawn one by one."""
    rates = np.array(shares, dtype=np.float32)[None, :]
    static = rates[0].astype(float)
    static[list(dynamic)] = 0.0
    threshold, other = np.empty(rates.shape, np.uint32), np.empty(rates.shape, np.int32)
    if static.sum() > 0:
        alias_table(static, threshold[0], other[0])
    indptr, genes, counts = draw_cells(
        Draw(5).cell_keys("counts", np.arange(cells)),
        np.zeros(cells, np.int64),
        np.full(cells, library),
        np.full(cells, -1, np.int64),
        np.zeros(cells),
        rates,
        threshold,
        other,
        np.array([static.sum()]),
        np.zeros((1, 0)),
        np.array([0.5, 0.5]),
        np.array(dynamic, dtype=np.int64),
        np.zeros(len(dynamic) + 1, np.int64),
        np.zeros(0, np.int64),
        np.zeros(0),
        dispersion,
        0,
        10,
    )
    return sparse.csr_matrix((counts, genes, indptr), shape=(cells, len(shares)))


def p_value(counts, mean: float, dispersion: float) -> float:
    """Chi-square of counts against the negative binomial (Poisson if dispersion is 0)."""
    law = (
        stats.nbinom(1 / dispersion, 1 / (1 + dispersion * mean))
        if dispersion
        else stats.poisson(mean)
    )
    top = int(law.ppf(1 - 50 / len(counts)))
    seen = np.bincount(np.minimum(counts.astype(int), top), minlength=top + 1)
    wanted = law.pmf(np.arange(top + 1)) * len(counts)
    wanted[-1] = law.sf(top - 1) * len(counts)
    low = int(law.ppf(50 / len(counts)))
    seen = np.concatenate([[seen[: low + 1].sum()], seen[low + 1 :]])
    wanted = np.concatenate([[wanted[: low + 1].sum()], wanted[low + 1 :]])
    if len(seen) == 1:
        return 1.0
    return float(stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue)


@pytest.mark.parametrize("dispersion", [0.0, 0.25, 2.0])
@pytest.mark.parametrize("dynamic", [(), range(6)], ids=["static", "dynamic"])
def test_counts_are_negative_binomial(dispersion, dynamic):
    counts = draw(SHARES, dispersion=dispersion, dynamic=dynamic).toarray()
    found = [
        p_value(counts[:, gene], LIBRARY * share, dispersion) for gene, share in enumerate(SHARES)
    ]
    assert min(found) > 1e-3, found
    assert counts.mean(0) == pytest.approx(
        LIBRARY * SHARES, abs=5 * np.sqrt((30 + dispersion * 900) / CELLS)
    )


def test_genes_of_a_cell_are_independent():
    counts = draw(SHARES, dispersion=0.25).toarray()
    off = np.corrcoef(counts[:, :4].T)[np.triu_indices(4, 1)]
    assert np.abs(off).max() < 4.5 / np.sqrt(CELLS)


def test_large_means_are_drawn_well_too():
    counts = draw([0.5, 0.5], dispersion=0.0, library=40_000.0, cells=2000).toarray()
    assert counts[:, 0].mean() == pytest.approx(20_000, abs=5 * np.sqrt(20_000 / 2000))
    assert counts[:, 0].var() == pytest.approx(20_000, rel=0.15)


def test_genes_ascend_within_a_cell_and_no_count_is_zero():
    rng = np.random.default_rng(0)
    found = draw(rng.dirichlet(np.ones(300)), dispersion=0.3, dynamic=(5, 64, 128), cells=500)
    assert (found.data > 0).all()
    assert found.has_canonical_format


def test_an_alias_table_holds_the_rates():
    rates = np.random.default_rng(1).gamma(0.1, size=1000)
    rates[:5] = 0.0
    threshold, other = np.empty(1000, np.uint32), np.empty(1000, np.int32)
    alias_table(rates, threshold, other)
    kept = (threshold.astype(float) + (threshold == 2**32 - 1)) / 2**32
    implied = kept.copy()
    np.add.at(implied, other, 1 - kept)
    assert implied / 1000 == pytest.approx(rates / rates.sum(), abs=1e-9)
    assert (implied[:5] == 0).all()


def test_the_compiled_hash_is_the_hash_of_ingest():
    counts = draw(np.full(200, 0.005), dispersion=1.0, cells=300)
    genes = hash64([f"g{i}" for i in range(200)])
    bits = counts.data.view(np.uint32)
    found = hash_cells(counts.indptr, counts.indices, bits, genes)
    assert np.array_equal(found, cell_hashes(counts.indptr, counts.indices, counts.data, genes))
