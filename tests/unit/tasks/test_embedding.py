"""The embedding task: every labelled cell is scored, no label is learnt."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.metrics.base import metric
from cellray.metrics.integration import score_integration
from cellray.metrics.probe import probe_embedding
from cellray.models.base import EmbedsCells
from cellray.tasks import _embedded
from cellray.tasks._embedded import score_cells
from cellray.tasks.base import asked_cells, ids_sha256, task
from cellray.tasks.embedding import TASK, EmbeddingConfig, embedding_split, score_embedding


def config_of(**keys: object) -> EmbeddingConfig:
    return build_section(EmbeddingConfig, {"name": "embedding", **keys})


def make_obs(num: int = 240) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "soma_joinid": np.arange(50, 50 + num),
            "cell_type": rng.choice(["alpha", "beta", "delta"], num).astype(object),
            "batch": rng.choice(["one", "two"], num).astype(object),
        }
    )
    obs.loc[3, "cell_type"] = None
    obs.loc[4, "cell_type"] = "unknown"
    return obs


def vectors(obs: pd.DataFrame, *, shift: float = 0.0) -> np.ndarray:
    """Cell types apart, batches ``shift`` apart."""
    rng = np.random.default_rng(1)
    codes, _ = pd.factorize(obs["cell_type"].fillna("none"))
    points = rng.normal(size=(len(obs), 5)).astype(np.float32)
    points[:, 0] += 4.0 * codes
    points[:, 1] += shift * (obs["batch"] == "two").to_numpy()
    return points


def test_the_unit_is_complete() -> None:
    assert task("embedding") is TASK
    assert TASK.needs == (EmbedsCells,)
    assert TASK.answers == "embedding"
    assert metric(TASK.headline).higher_is_better
    assert {"pca", "hvg", "noise", "celltype_jitter", "random_projection"} <= set(TASK.compulsory)


def test_all_labelled_cells_are_asked_for_and_nothing_is_learnt() -> None:
    obs = make_obs()
    config = config_of(batch="batch")
    split = embedding_split(obs, config, seed=0)
    labelled = np.delete(obs["soma_joinid"].to_numpy(), [3, 4])
    np.testing.assert_array_equal(asked_cells(TASK, split), labelled)
    assert len(split.validation) == len(split.test) == 0
    assert split.left_out == {"no label": 2}
    assert split.split_sha256 == ids_sha256(labelled)
    assert embedding_split(obs, config, seed=9).split_sha256 == split.split_sha256
    targets = TASK.fit(obs, config, split)
    assert (targets.codes == -1).all()
    assert targets.classes == ()
    assert targets.objective == ""


def test_scores_are_those_of_the_metric_modules() -> None:
    obs = make_obs()
    points = vectors(obs, shift=3.0)
    before = vectors(obs, shift=6.0)
    scores = score_embedding(obs, config_of(batch="batch"), points, before, 0)
    rows = np.delete(np.arange(len(obs)), [3, 4])
    truth, batch = obs["cell_type"].to_numpy()[rows], obs["batch"].to_numpy()[rows]
    expected = score_integration(points[rows], truth, batch, before=before[rows], seed=0)
    expected |= probe_embedding(points[rows], truth)
    assert scores == {**expected, "n_scored_cells": 238.0}
    assert "total_60_40.bio5_batch5.v1" in scores
    assert all(metric(name) for name in scores)


def test_without_batches_the_bio_part_stands_alone() -> None:
    obs = make_obs()
    points = vectors(obs)
    for config in (config_of(), config_of(batch="one_batch")):
        scores = score_embedding(obs.assign(one_batch="x"), config, points, points, 0)
        assert TASK.headline in scores
        assert "accuracy.linear_probe.v1" in scores
        absent = ("ilisi.v1", "bras.v1", "kbet.diffusion.v1", "asw_batch.v1")
        assert not set(absent) & set(scores)
        assert not [name for name in scores if "total" in name or "batch" in name]


def test_a_shift_between_batches_costs_the_batch_part() -> None:
    obs = make_obs()
    config = config_of(batch="batch")
    mixed = score_embedding(obs, config, vectors(obs), vectors(obs, shift=6.0), 0)
    apart = score_embedding(obs, config, vectors(obs, shift=6.0), vectors(obs, shift=6.0), 0)
    part = "batch_mean.bras_ilisi_kbet_connectivity_pcr.v1"
    assert mixed[part] > apart[part] + 0.3


def test_many_cells_are_scored_by_a_subsample(monkeypatch: pytest.MonkeyPatch) -> None:
    obs = make_obs(400)
    monkeypatch.setattr(
        _embedded, "scored_rows", lambda labels: np.arange(0, len(labels), 2, dtype=np.int64)
    )
    scores = score_embedding(obs, config_of(), vectors(obs), vectors(obs), 0)
    assert scores["n_scored_cells"] == 199


def test_probes_are_left_out_where_no_class_is_large_enough() -> None:
    labels = np.array([f"t{i // 9}" for i in range(99)], dtype=object)
    points = np.random.default_rng(0).normal(size=(99, 3)).astype(np.float32)
    with pytest.warns(UserWarning, match="the probes are left out: 0 of 11 classes"):
        scores = score_cells(points, labels, None, points, seed=0)
    assert "n_probe_cells" not in scores
    assert "nmi.kmeans.v1" in scores


def test_refusals() -> None:
    obs = make_obs()
    config = config_of(batch="batch")
    with pytest.raises(DataError, match=r"task.batch = 'batchs': obs has no such column"):
        TASK.columns(config_of(batch="batchs"), ["cell_type", "batch"])
    with pytest.raises(DataError, match="no cell can be scored: of 240 cells 0 have"):
        embedding_split(obs.assign(cell_type="unknown"), config, seed=0)
    with pytest.raises(DataError, match="all 240 cells have the 'cell_type' 'T': an embedding"):
        embedding_split(obs.assign(cell_type="T"), config, seed=0)
    points = vectors(obs)
    with pytest.raises(DataError, match="240 cells in the embedding but 239 labels"):
        score_embedding(obs[1:], config, points, points, 0)
    with pytest.raises(DataError, match="none of the 240 cells has a label"):
        score_embedding(obs.assign(cell_type=None), config, points, points, 0)
    with pytest.raises(ConfigError, match="answered with an embedding: it has no labels to score"):
        TASK.score([], [], [])
