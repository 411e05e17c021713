"""Units that embed: what is fitted on training cells alone, what agrees with what, real cells."""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np
import numpy.typing as npt
import pytest
from cells_for_baselines import made_cells
from scipy import sparse

from cellray.baselines._features import FeatureConfig, fit_genes
from cellray.baselines.base import BaselineConfig, CellCounts, annotate_with, baseline, embed_with
from cellray.baselines.harmony import HarmonyConfig
from cellray.core.section import build_section
from cellray.metrics.integration import score_integration

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

INDUCTIVE = ["pca", "hvg", "random_projection", "noise"]
CORRECTING = ["harmony", "combat"]
BIO = "bio_mean.nmi_ari_asw_isolated_clisi.v1"
BATCH = "batch_mean.bras_ilisi_kbet_connectivity_pcr.v1"


def cells_of(num: int = 150, *, seed: int = 0) -> tuple[CellCounts, I64]:
    counts, labels = made_cells(num, seed=seed)
    return CellCounts(counts, np.arange(num, dtype=np.int64) % 4 // 2), labels


def small(name: str, **over: object) -> BaselineConfig:
    genes = {} if name in ("noise", "celltype_jitter") else {"num_genes": 40}
    return build_section(baseline(name).config, {"name": name} | genes | over)


def both(name: str, train: CellCounts, query: CellCounts | None, seed: int = 3) -> tuple[F32, F32]:
    embed = baseline(name).embed
    assert embed is not None
    first, second = embed(small(name), train, query, seed)
    return first, np.zeros((0, 1), dtype=np.float32) if second is None else second


@pytest.mark.parametrize("name", INDUCTIVE)
def test_nothing_of_the_query_cells_reaches_an_inductive_embedding(name: str) -> None:
    """Permuted, fewer, more, overwritten or absent: every other cell lies where it lay."""
    cells, _ = cells_of()
    train, query = cells.rows(np.arange(100)), cells.rows(np.arange(100, 150))
    reference, found = both(name, train, query)
    order = np.random.default_rng(0).permutation(50)
    here, moved = both(name, train, query.rows(order))
    np.testing.assert_array_equal(here, reference)
    np.testing.assert_array_equal(moved, found[order])
    np.testing.assert_array_equal(both(name, train, query.rows(np.arange(3)))[1], found[:3])
    np.testing.assert_array_equal(both(name, train, None)[0], reference)
    other = query.counts.toarray()
    other[1:] = 7.0
    here, changed = both(name, train, CellCounts(sparse.csr_matrix(other), query.batches))
    np.testing.assert_array_equal(here, reference)
    np.testing.assert_array_equal(changed[0], found[0])
    alone = embed_with(baseline(name), small(name), train, 3)
    np.testing.assert_array_equal(alone, reference)


@pytest.mark.parametrize("name", [*INDUCTIVE, *CORRECTING, "celltype_jitter"])
def test_the_same_seed_gives_the_same_embedding_bit_for_bit(name: str) -> None:
    cells, labels = cells_of()
    unit = baseline(name)
    first, again, other = (
        embed_with(unit, small(name), cells, seed, truth=labels) for seed in (5, 5, 6)
    )
    assert first.dtype == np.float32
    assert first.tobytes() == again.tobytes()
    if not unit.seed_scope:
        assert first.tobytes() == other.tobytes()
    elif name != "harmony":  # whose clusters may come out alike
        assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize("name", CORRECTING)
def test_corrected_query_cells_lie_in_their_order_and_see_no_label(name: str) -> None:
    cells, labels = cells_of()
    train, query = cells.rows(np.arange(100)), cells.rows(np.arange(100, 150))
    reference, found = both(name, train, query)
    assert (reference.shape[0], found.shape[0]) == (100, 50)
    answer = annotate_with(baseline(name), small(name), train, labels[:100], query, 3)
    assert answer.embedding is not None
    assert (answer.codes == labels[100:]).mean() > 0.95
    turned = (labels[:100] + 1) % 3
    again = annotate_with(baseline(name), small(name), train, turned, query, 3)
    np.testing.assert_array_equal(again.embedding, answer.embedding)
    np.testing.assert_array_equal(again.codes, (answer.codes + 1) % 3)


@pytest.mark.parametrize("name", CORRECTING)
def test_genes_are_those_of_the_cells_fitted_on(name: str) -> None:
    """A gene that only query cells vary in is not looked at: their counts of it change nothing."""
    cells, _ = cells_of()
    dense = cells.counts.toarray()
    train = cells.rows(np.arange(100))
    wanted = FeatureConfig(name=name, num_genes=40)
    chosen = fit_genes(train.counts, wanted, train.batches).genes
    left_out = np.setdiff1d(np.arange(120), chosen)
    dense[100:, left_out] = dense[100:, left_out[::-1]]  # library sizes stay
    query = cells.rows(np.arange(100, 150))
    changed = CellCounts(sparse.csr_matrix(dense[100:]), query.batches)
    for ours, theirs in zip(both(name, train, query), both(name, train, changed), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_variable_genes_are_the_features_of_the_others() -> None:
    cells, _ = cells_of()
    found = embed_with(baseline("hvg"), small("hvg"), cells, 0)
    genes = fit_genes(cells.counts, FeatureConfig(name="hvg", num_genes=40), cells.batches)
    np.testing.assert_array_equal(found, genes.apply(cells.counts).toarray())


def test_a_gene_that_differs_between_batches_alone_is_no_feature() -> None:
    cells, _ = cells_of()
    assert cells.batches is not None
    dense = cells.counts.toarray()
    dense[:, 77] = np.where(cells.batches == 0, 40, 1)
    shifted = CellCounts(sparse.csr_matrix(dense), cells.batches)
    wanted = FeatureConfig(name="x", num_genes=40)
    assert 77 in fit_genes(shifted.counts, wanted).genes
    assert 77 not in fit_genes(shifted.counts, wanted, shifted.batches).genes
    hvg = embed_with(baseline("hvg"), small("hvg"), shifted, 0)
    chosen = fit_genes(shifted.counts, wanted, shifted.batches)
    np.testing.assert_array_equal(hvg, chosen.apply(shifted.counts).toarray())


def test_a_random_projection_keeps_distances_on_average() -> None:
    cells, _ = cells_of()
    config = small("random_projection", num_dimensions=2000)
    found = embed_with(baseline("random_projection"), config, cells, 0)
    genes = embed_with(baseline("hvg"), small("hvg"), cells, 0)
    assert found.shape == (150, 2000)
    ours = np.linalg.norm(found[1:] - found[:1], axis=1)
    theirs = np.linalg.norm(genes[1:] - genes[:1], axis=1)
    np.testing.assert_allclose(ours / theirs, 1, atol=0.1)


@pytest.mark.parametrize("k", [15])
def test_knn_is_the_vote_in_the_components_of_cells_taken_as_one_batch(k: int) -> None:
    cells, labels = cells_of()
    cells = CellCounts(cells.counts)
    train, query = cells.rows(np.arange(100)), cells.rows(np.arange(100, 150))
    vote = annotate_with(baseline("knn"), small("knn"), train, labels[:100], query, 0)
    embedded = annotate_with(baseline("pca"), small("pca"), train, labels[:100], query, 0)
    np.testing.assert_array_equal(vote.codes, embedded.codes)
    np.testing.assert_array_equal(vote.confidence, embedded.confidence)
    np.testing.assert_array_equal(vote.embedding, embedded.embedding)
    assert vote.confidence is not None
    np.testing.assert_allclose(vote.confidence * k, np.rint(vote.confidence * k), atol=1e-12)


@pytest.mark.parametrize("seed", [0, (1 << 32) - 1])
def test_harmony_takes_few_cells_and_the_largest_seed(seed: int) -> None:
    cells, _ = cells_of(20)
    config = HarmonyConfig(num_genes=40, num_components=5)
    found = embed_with(baseline("harmony"), config, cells, seed)
    assert found.shape == (20, 5)
    assert np.isfinite(found).all()


def test_harmony_takes_a_batch_of_one_cell() -> None:
    cells, _ = cells_of(60)
    alone = CellCounts(cells.counts, (np.arange(60) == 7).astype(np.int64))
    assert np.isfinite(embed_with(baseline("harmony"), small("harmony"), alone, 0)).all()


def test_controls_and_corrections_stand_in_order_on_real_cells() -> None:
    """Truth above all above noise on biology; corrections mix batches better than components do."""
    if not os.environ.get("CELLRAY_DATA"):
        pytest.skip("not run: CELLRAY_DATA is not set")
    data = ad.read_h5ad(Path(os.environ["CELLRAY_DATA"]) / "cells" / "cellmix_sc_mixology.h5ad")
    batches, labels = (
        data.obs[column].astype("category").cat.codes.to_numpy(dtype=np.int64)
        for column in ("batch", "cell_type")
    )
    every = CellCounts(sparse.csr_matrix(data.X, dtype=np.float32), batches)
    cells, labels = every.rows(np.arange(0, 1021, 3)), labels[::3]
    names = ["pca", "hvg", "random_projection", "harmony", "combat", "noise", "celltype_jitter"]
    embedded = {}
    for name in names:
        config = baseline(name).config(name=name)
        embedded[name] = embed_with(baseline(name), config, cells, 0, truth=labels)
    scores = {
        name: score_integration(z, labels, cells.batches, before=embedded["pca"])  # type: ignore[arg-type]
        for name, z in embedded.items()
    }
    for name in names[:-2]:
        assert scores["celltype_jitter"][BIO] > scores[name][BIO] > scores["noise"][BIO] + 0.3
    for name in CORRECTING:
        assert scores[name][BATCH] > scores["pca"][BATCH] + 0.1
        assert scores[name]["ilisi.v1"] > scores["pca"]["ilisi.v1"]
    assert scores["noise"]["ilisi.v1"] > max(scores[n]["ilisi.v1"] for n in names[:-2])
