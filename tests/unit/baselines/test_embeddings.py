"""Baselines that embed cells, and controls: what they are fitted on, what they agree with."""

from __future__ import annotations

import warnings
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
from cells_for_baselines import made_cells
from scipy import sparse
from sklearn.decomposition import PCA

from cellray.baselines.base import (
    CellCounts,
    annotate_with,
    baseline,
    check_available,
    embed_with,
)
from cellray.core.errors import ConfigError, DataError
from cellray.metrics.integration import score_integration

INDUCTIVE = ["pca", "hvg", "random_projection"]
CORRECTING = ["harmony", "combat"]


def cells_of(num, seed=0, batches=2):
    counts, labels = made_cells(num, seed=seed)
    return CellCounts(counts, np.arange(num) % batches), labels


def config_of(name):
    unit = baseline(name)
    return unit, unit.config(name=name)


@pytest.mark.parametrize("name", INDUCTIVE)
def test_what_is_fitted_depends_on_the_training_cells_alone(name):
    unit, config = config_of(name)
    cells, _ = cells_of(120)
    train = CellCounts(cells.counts[:80], cells.batches[:80])
    test = CellCounts(cells.counts[80:], cells.batches[80:])
    here, there = unit.embed(config, train, test, 3)
    order = np.random.default_rng(0).permutation(40)
    moved = CellCounts(test.counts[order], test.batches[order])
    again, shuffled = unit.embed(config, train, moved, 3)
    np.testing.assert_array_equal(here, again)
    np.testing.assert_array_equal(there[order], shuffled)
    few = CellCounts(test.counts[:1], test.batches[:1])
    np.testing.assert_allclose(unit.embed(config, train, few, 3)[1][0], there[0], rtol=1e-5)
    np.testing.assert_array_equal(unit.embed(config, train, None, 3)[0], here)


def test_principal_components_equal_scikit_learns():
    cells, _ = cells_of(150)
    unit, config = config_of("pca")
    config = config.model_copy(update={"num_components": 5})
    ours = embed_with(unit, config, cells, 0)
    hvg = embed_with(*config_of("hvg"), cells, 0).astype(np.float64)
    theirs = PCA(5, svd_solver="full").fit_transform(hvg)
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-4)


def test_knn_is_the_vote_in_the_components():
    cells, labels = cells_of(160)
    train = CellCounts(cells.counts[:100], cells.batches[:100])
    query = CellCounts(cells.counts[100:], cells.batches[100:])
    one = annotate_with(*config_of("knn"), train, labels[:100], query, 0)
    two = annotate_with(*config_of("pca"), train, labels[:100], query, 0)
    np.testing.assert_array_equal(one.codes, two.codes)
    np.testing.assert_array_equal(one.confidence, two.confidence)
    assert (one.codes == labels[100:]).mean() > 0.9


@pytest.mark.parametrize("name", [*INDUCTIVE, *CORRECTING, "noise", "shuffled_labels"])
def test_the_same_seed_gives_the_same_answer_bit_for_bit(name):
    unit, config = config_of(name)
    cells, labels = cells_of(90)
    if unit.embed is not None:
        first, again = (embed_with(unit, config, cells, 5) for _ in range(2))
        assert first.shape[0] == 90
        assert first.dtype == np.float32
    else:
        first, again = (annotate_with(unit, config, cells, labels, cells, 5).codes for _ in "ab")
    assert first.tobytes() == again.tobytes()


@pytest.mark.parametrize("name", ["random_projection", "noise"])
def test_a_seed_changes_what_is_drawn(name):
    cells, _ = cells_of(90)
    assert not np.allclose(
        embed_with(*config_of(name), cells, 1), embed_with(*config_of(name), cells, 2)
    )


@pytest.mark.parametrize("name", [*CORRECTING, "batch_only"])
def test_cells_of_one_batch_have_nothing_to_correct(name):
    unit, config = config_of(name)
    cells, labels = cells_of(60, batches=1)
    with pytest.raises(DataError, match=f"'{name}' corrects batches and the cells are of one"):
        annotate_with(unit, config, cells, labels, cells, 0)


def test_batch_only_says_the_most_frequent_class_of_the_batch():
    counts = sparse.csr_matrix(np.ones((6, 3), dtype=np.float32))
    train = CellCounts(counts, np.array([0, 0, 0, 1, 1, 1]))
    labels = np.array([2, 2, 0, 1, 1, 2])
    query = CellCounts(counts[:3], np.array([0, 1, 4]))
    found = annotate_with(*config_of("batch_only"), train, labels, query, 0)
    assert found.codes.tolist() == [2, 1, 2]
    np.testing.assert_allclose(found.confidence, [2 / 3, 2 / 3, 3 / 6])


def test_shuffled_labels_come_as_often_as_in_training():
    cells, _ = cells_of(3000)
    labels = np.repeat([0, 1, 2], [1500, 900, 600])
    found = annotate_with(*config_of("shuffled_labels"), cells, labels, cells, 1)
    np.testing.assert_allclose(np.bincount(found.codes) / 3000, [0.5, 0.3, 0.2], atol=0.03)


def test_an_optional_package_that_is_missing_is_named():
    unit = baseline("scvi")
    with pytest.raises(ConfigError, match=r"'scvi' needs the package nowhere.*cellray\[scvi\]"):
        check_available(replace(unit, requires=("nowhere",)))


def test_a_baseline_that_does_not_fit_the_task_is_refused():
    cells, labels = cells_of(30)
    with pytest.raises(ConfigError, match="'majority' has no embedding"):
        embed_with(*config_of("majority"), cells, 0)
    with pytest.raises(ConfigError, match="'celltype_jitter' gives no labels"):
        annotate_with(*config_of("celltype_jitter"), cells, labels, cells, 0)


def test_log_data_are_refused_by_every_baseline():
    counts, labels = made_cells(30)
    logged = CellCounts(counts.log1p(), np.arange(30) % 2)
    for name in ("pca", "hvg", "harmony"):
        with pytest.raises(DataError, match="these are not whole numbers"):
            embed_with(*config_of(name), logged, 0)
        with pytest.raises(DataError, match="these are not whole numbers"):
            annotate_with(*config_of(name), logged, labels, logged, 0)


@pytest.fixture(scope="module")
def cellmix(cellray_data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = ad.read_h5ad(cellray_data / "cells" / "cellmix_sc_mixology.h5ad")
    batches = data.obs["batch"].astype("category").cat.codes.to_numpy(np.int64)
    labels = data.obs["cell_type"].astype("category").cat.codes.to_numpy(np.int64)
    return CellCounts(sparse.csr_matrix(data.X, dtype=np.float32), batches), labels


def scores_of(name, cellmix):
    cells, labels = cellmix
    unit, config = config_of(name)
    told = labels if unit.needs_labels else None
    embedding = embed_with(unit, config, cells, 0, truth=told)
    before = embed_with(*config_of("pca"), cells, 0)
    return score_integration(
        embedding, labels.astype(str), cells.batches.astype(str), before=before
    )


def test_controls_frame_what_corrects_batches_on_real_cells(cellmix):
    found = {n: scores_of(n, cellmix) for n in ("pca", "harmony", "noise", "celltype_jitter")}
    bio = "bio_mean.nmi_ari_asw_isolated_clisi.v1"
    batch = "batch_mean.bras_ilisi_kbet_connectivity_pcr.v1"
    assert found["harmony"][batch] > found["pca"][batch]
    assert found["celltype_jitter"][bio] > found["harmony"][bio] > found["noise"][bio]
    assert found["celltype_jitter"][bio] > found["pca"][bio] > found["noise"][bio]
    # noise mixes batches perfectly: a batch score alone says nothing
    assert found["noise"]["ilisi.v1"] > found["harmony"]["ilisi.v1"]


def test_scvi_mixes_batches_better_than_components(cellmix):
    pytest.importorskip("scvi", reason="not run: scvi-tools is not installed")
    cells, _ = cellmix
    unit, config = config_of("scvi")
    config = config.model_copy(update={"max_epochs": 40})
    embedding = embed_with(unit, config, cells, 0)
    assert embedding.shape == (1021, 30)
    assert np.isfinite(embedding).all()
