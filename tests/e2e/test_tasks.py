"""Integration and label transfer as whole runs on a small store."""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
import pytest

from cellray.core.section import merge
from cellray.infer.load import load
from cellray.runs import build_run, run_job
from cellray.train.answers import ANSWERS_DIR
from cellray.train.cell_log import read_cell_log
from cellray.train.saving import committed
from helpers_cells import known_cells
from helpers_runs import finetune_raw, pretrain_run, progress

pytestmark = pytest.mark.ray

PARTS = {"gep", "gepc", "expressed", "expressed_from_cell", "ecs", "dar"}


@pytest.fixture(scope="module")
def pretrained(small_store, ray_cluster, tmp_path_factory):
    over = {
        "engine": {"name": "torch", "zero_stage": 0},
        "scale": {"workers": 1},
        "train": {"eval_every_steps": 0, "log_every_steps": 12},
        "checkpoint": {"every_steps": 0},
    }
    return run_job(pretrain_run(small_store, tmp_path_factory.mktemp("pre"), **over)).model_dir


def run_of(uri: str, folder: Path, task: dict, **over):
    raw = finetune_raw(uri, folder)
    raw["task"] = task
    return build_run("finetune", merge(raw, over))


@pytest.mark.slow
def test_integration_trains_every_part_and_scores_the_embedding(pretrained, small_store, tmp_path):
    said: list[str] = []
    run = run_of(
        small_store,
        tmp_path,
        {"name": "integration", "batch": "donor", "num_genes": 30},
        init_from=pretrained,
        train={"steps": 30, "log_every_steps": 10, "eval_every_steps": 10, "log_cells": True},
        checkpoint={"every_steps": 10},
    )
    result = run_job(run, said.append)
    assert any(line.startswith("recipe: integration of scgpt") for line in said)
    assert any("drawn anew by the seed" in line and "adversary (10)" in line for line in said)

    reports = progress(result.trained.run_dir)
    for report in reports:
        assert {f"train/{part}" for part in PARTS} <= set(report)
        assert {f"validation/{part}" for part in PARTS} <= set(report)
        assert all(report[f"train/{part}"] > 0 for part in PARTS)
    best = min(committed(result.trained.run_dir), key=lambda note: note["validation/loss"])
    assert result.trained.step == best["step"]

    model = load(result.trained.model_dir)
    norms = model.backbone.domain_norm.norms
    assert len(norms) == 4
    log = read_cell_log(result.trained.run_dir)
    steps = [number for number in log if number <= best["step"]]
    donors = [log[number]["cells"][0] % 4 for number in steps]
    assert len(steps) == best["step"]
    counted = [sum((d == donor).any() for d in donors) for donor in range(4)]
    assert [int(norm.num_batches_tracked) for norm in norms] == counted
    assert len({tuple(norm.running_mean.tolist()) for norm in norms}) == 4
    assert model.manifest.classes == []

    assert result.test["n_scored_cells"] == 240
    assert result.test["avg_bio.scgpt_leiden.v1"] > 0
    logged = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    metrics = logged.get_run(result.trained.mlflow_run_id).data.metrics
    assert metrics["test/ilisi.v1"] == result.test["ilisi.v1"]
    assert "train/dar" in metrics
    picture = Path(result.trained.run_dir) / "umap.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    kept = logged.list_artifacts(result.trained.mlflow_run_id, ANSWERS_DIR)
    assert f"{ANSWERS_DIR}/umap.png" in [entry.path for entry in kept]

    cells = known_cells()
    alone = model.embed(cells[:5].copy())
    np.testing.assert_allclose(alone, model.embed(cells)[:5], atol=1e-5)


@pytest.mark.slow
def test_labels_are_transferred_to_whole_batches(pretrained, small_store, tmp_path):
    run = run_of(
        small_store,
        tmp_path,
        {"name": "label_transfer", "batch": "donor", "query": ["d2", "d3"]},
        init_from=pretrained,
        train={"steps": 80},
    )
    result = run_job(run)
    assert result.test["n_items"] == 120
    assert result.test["n_query_batches"] == 2
    each = [result.test[f"macro_f1_test.batch_0{number}.v1"] for number in (1, 2)]
    assert result.test["macro_f1_test.batch_min.v1"] == min(each) > 0.5  # three types
    assert result.test["macro_f1_test.batch_mean.v1"] == pytest.approx(np.mean(each))
