import numpy as np
import pytest
from cells_by_hand import make_counts
from test_soma import make_census

from cellray.core.errors import DataError
from cellray.data.soma import open_store
from cellray.data.stats import (
    VocabCoverage,
    check_coverage,
    coverage,
    library_size_quantiles,
    nonzero_medians,
)
from cellray.data.vocab import Vocab

COUNTS = make_counts(90, 30, seed=8)


@pytest.fixture
def store(make_store):
    return make_store(COUNTS)


def slow_medians(counts, genes):
    normalised = counts / counts.sum(axis=1, keepdims=True) * 10_000
    columns = [normalised[:, g][counts[:, g] > 0] for g in genes]
    return np.array([np.median(c) if len(c) else 1.0 for c in columns])


@pytest.mark.parametrize("cells_per_block", [7, 64, 4096])
def test_medians_equal_numpys(store, cells_per_block):
    gene_map = np.arange(30, dtype=np.int32)
    joinids = np.random.default_rng(0).permutation(90)[:71]
    found = nonzero_medians(store, joinids, gene_map, 30, cells_per_block=cells_per_block)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, slow_medians(COUNTS[joinids], range(30)), rtol=1e-6)


def test_medians_use_all_genes_for_the_library_size_and_the_vocabularys_order(store):
    gene_map = np.full(30, -1, dtype=np.int32)
    gene_map[[4, 9, 1]] = [0, 2, 1]
    found = nonzero_medians(store, np.arange(90), gene_map, 3)
    np.testing.assert_allclose(found, slow_medians(COUNTS, [4, 1, 9]), rtol=1e-6)


def test_a_gene_never_seen_has_median_one(store):
    gene_map = np.full(30, -1, dtype=np.int32)
    gene_map[3] = 1
    found = nonzero_medians(store, np.arange(90), gene_map, 4)
    assert found[[0, 2, 3]].tolist() == [1.0, 1.0, 1.0]
    assert found[1] > 1.0
    assert nonzero_medians(store, np.array([], np.int64), gene_map, 2).tolist() == [1.0, 1.0]


def test_library_size_quantiles_from_obs_and_from_x(store, tmp_path):
    joinids = np.array([5, 80, 3, 44])
    expected = np.quantile(COUNTS[joinids].sum(axis=1), [0.0, 0.5, 1.0])
    census = open_store(make_census(tmp_path / "census", COUNTS))
    for source in (store, census):
        found = library_size_quantiles(source, joinids, quantiles=[0.0, 0.5, 1.0])
        np.testing.assert_allclose(found, expected)
    with pytest.raises(DataError, match="library sizes of no cells"):
        library_size_quantiles(store, np.array([], np.int64))


def vocab_of(genes):
    ids = [f"ENSG{i:011d}" for i in genes]
    return Vocab.from_genes(ids, [""] * len(ids), specials=["<pad>"])


def test_coverage_counts_genes_and_counts(store):
    covered = coverage(store, vocab_of([0, 1, 2, 3, 4, 99]))
    assert (covered.genes_in_store, covered.genes_matched) == (30, 5)
    assert covered.cells_sampled == 90
    assert covered.count_fraction == pytest.approx(COUNTS[:, :5].sum() / COUNTS.sum())


def test_coverage_samples_at_most_so_many_cells(store):
    covered = coverage(store, vocab_of(range(30)), max_cells=70)
    assert 0 < covered.cells_sampled <= 70
    assert covered.count_fraction == 1.0
    some = coverage(store, vocab_of(range(5)), joinids=np.array([7, 2]))
    assert some.cells_sampled == 2
    part = COUNTS[[7, 2]]
    assert some.count_fraction == pytest.approx(part[:, :5].sum() / part.sum())


def test_full_coverage_warns_of_nothing(store):
    vocab = vocab_of(range(30))
    assert check_coverage(coverage(store, vocab), vocab) == []
    edge = VocabCoverage(10, 5, 0.60, 100)
    assert check_coverage(edge, vocab) == []


def test_low_coverage_warns_with_the_fraction():
    covered = VocabCoverage(20_000, 1_500, 0.25, 4096)
    (warning,) = check_coverage(covered, vocab_of([1]))
    assert "covers only 25.0% of the counts (1,500 of 20,000 genes; 4,096 cells" in warning
    assert "75.0% are lost" in warning


def test_chosen_genes_are_judged_by_how_many_of_them_are_there():
    vocab = vocab_of(range(30))
    most, few = (VocabCoverage(20_000, n, 0.05, 4096) for n in (18, 17))
    (warning,) = check_coverage(most, vocab, refuse=True, chosen=True)
    assert "covers only 5.0% of the counts" in warning
    with pytest.raises(DataError, match="the store has only 17 of the 30 genes that the model"):
        check_coverage(few, vocab, refuse=True, chosen=True)
    assert check_coverage(few, vocab, chosen=True)


def test_no_gene_in_common_shows_both_kinds_of_id(store):
    vocab = Vocab.from_genes(["Trp53", "Ins2"], ["Trp53", "Ins2"], specials=["<pad>"])
    expected = r"no gene in common.*ENSG00000000000.*vocabulary's like Trp53, Ins2"
    with pytest.raises(DataError, match=expected):
        check_coverage(coverage(store, vocab), vocab)
