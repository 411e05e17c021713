"""Fine-tuning, the registered model, the benchmark and the sweep, on real components."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anndata as ad
import mlflow
import numpy as np
import pandas as pd
import pytest

import cellray
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import to_toml
from cellray.data.soma import open_store
from cellray.infer.load import load
from cellray.runs import build_run, run_job
from cellray.train.finetune import prepare_finetune
from cellray.train.saving import committed
from helpers_cells import known_cells
from helpers_runs import SCGPT, finetune_raw, finetune_run, pretrain_run

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def pretrained(small_store, ray_cluster, tmp_path_factory):
    over = {
        "engine": {"name": "torch", "zero_stage": 0},
        "scale": {"workers": 1},
        "train": {"eval_every_steps": 0, "log_every_steps": 12},
        "checkpoint": {"every_steps": 0},
    }
    return run_job(pretrain_run(small_store, tmp_path_factory.mktemp("pre"), **over)).model_dir


@pytest.fixture(scope="module")
def tuned(pretrained, small_store, tmp_path_factory):
    """A fine-tuned, registered model."""
    folder = tmp_path_factory.mktemp("fine")
    # a notebook that has an experiment of its own open keeps it
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path_factory.mktemp('own') / 'own.db'}")
    mlflow.set_experiment("elsewhere")
    run = finetune_run(small_store, folder, init_from=pretrained, register_as="three-types")
    return run_job(run), f"sqlite:///{folder / 'mlflow.db'}"


def test_it_learns_the_types_and_scores_the_held_out_donor(tuned):
    result, uri = tuned
    assert result.test["accuracy.v1"] > 0.8  # three types, chance is 1/3
    assert result.test["n_items"] == 60
    run = mlflow.MlflowClient(tracking_uri=uri).get_run(result.trained.mlflow_run_id)
    assert run.data.metrics["test/accuracy.v1"] == result.test["accuracy.v1"]
    assert any(line.startswith("test macro_f1.union.v1") for line in result.lines())


def test_the_best_checkpoint_by_validation_is_exported(tuned):
    result, _ = tuned
    best = min(committed(result.trained.run_dir), key=lambda r: r["validation/loss"])
    assert result.trained.step == best["step"]


def test_test_labels_never_reach_the_workers(pretrained, small_store, tmp_path):
    prepared = prepare_finetune(finetune_run(small_store, tmp_path, init_from=pretrained))
    codes = prepared.job.data.source.codes["label"]
    test = np.isin(prepared.cells.joinids, prepared.split.test)
    assert test.sum() == 60
    assert (codes[test] == -1).all()
    assert (codes[~test] >= 0).all()
    assert not set(prepared.job.data.plan.joinids) & set(prepared.split.test)
    assert not set(prepared.job.data.validation) & set(prepared.split.test)


def test_a_missing_label_column_is_named(pretrained, small_store, tmp_path):
    raw = finetune_raw(small_store, tmp_path, init_from=pretrained)
    raw["task"]["label"] = "celltype"
    with pytest.raises(DataError, match=r"'celltype': obs has no such column\. Did you mean 'cell"):
        run_job(build_run("finetune", raw))


def test_one_start_is_needed(small_store, tmp_path):
    with pytest.raises(ConfigError, match="either init_from .* not neither"):
        finetune_run(small_store, tmp_path)
    with pytest.raises(ConfigError, match="either init_from .* not both"):
        finetune_run(small_store, tmp_path, init_from="x", model=SCGPT)


def shuffled_cells() -> ad.AnnData:
    """Twenty of the known cells, genes permuted, five missing, ids with version."""
    cells = known_cells()[60:80].copy()
    order = np.random.default_rng(0).permutation(60)[5:]
    cells = cells[:, order].copy()
    cells.var_names = [f"{name}.7" for name in cells.var_names]
    return cells


def test_the_registered_model_annotates_in_a_fresh_process(tuned, tmp_path):
    result, uri = tuned
    assert result.registered == "models:/three-types/1"
    shuffled_cells().write_h5ad(tmp_path / "new.h5ad")
    code = (
        "import sys, mlflow\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model('models:/three-types/1')\n"
        "model.predict(sys.argv[2]).to_csv(sys.argv[3])\n"
    )
    words = [sys.executable, "-c", code, uri, str(tmp_path / "new.h5ad"), str(tmp_path / "o.csv")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(tmp_path / "o.csv", index_col=0)
    assert found.index.tolist() == shuffled_cells().obs_names.tolist()
    here = cellray.load(result.trained.model_dir).annotate(shuffled_cells())
    assert found["label"].tolist() == here["label"].tolist()
    np.testing.assert_allclose(found["probability"], here["probability"], rtol=1e-5)
    truth = shuffled_cells().obs["cell_type"].astype(str).tolist()
    assert np.mean([a == b for a, b in zip(truth, here["label"], strict=True)]) > 0.7


def test_gene_order_does_not_change_an_embedding(tuned):
    model = load(tuned[0].trained.model_dir)
    cells = known_cells()[:12].copy()
    shuffled = cells[:, ::-1].copy()
    np.testing.assert_allclose(model.embed(cells), model.embed(shuffled), atol=1e-5)


def test_new_cells_that_cannot_be_used(tuned):
    model = load(tuned[0].trained.model_dir)
    cells = known_cells()[:5].copy()
    cells.X = cells.X + cells.X * 0.5
    with pytest.raises(DataError, match="needs raw counts, but the matrix holds [0-9]*[.]5"):
        model.annotate(cells)
    foreign = known_cells()[:5].copy()
    foreign.var_names = [f"OTHER{i}" for i in range(60)]
    with pytest.raises(DataError, match="none of the 60 genes .* is in the model's vocabulary"):
        model.annotate(foreign)


def test_a_store_without_common_genes_is_refused(pretrained, tmp_path):
    from cellray.data.ingest import IngestConfig, ingest

    cells = known_cells()
    cells.var_names = [f"OTHER{i}" for i in range(60)]
    cells.write_h5ad(tmp_path / "other.h5ad")
    uri = str(tmp_path / "store")
    ingest(IngestConfig(files=[str(tmp_path / "other.h5ad")], uri=uri))
    with pytest.raises(DataError, match="no gene in common|has no gene of|shares no gene"):
        run_job(finetune_run(uri, tmp_path, init_from=pretrained))


def benchmark_raw(uri, folder, methods):
    return {
        "name": "bench",
        "seeds": [0, 1],
        "methods": methods,
        "task": finetune_raw(uri, folder)["task"],
        "data": {"uri": uri},
        "checkpoint": {"dir": str(folder)},
    }


def test_a_benchmark_compares_tracks_and_goes_on(pretrained, small_store, tmp_path):
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(to_toml(finetune_raw(small_store, tmp_path, init_from=pretrained)))
    raw = finetune_raw(small_store, tmp_path, init_from=pretrained)
    bad.write_text(to_toml(raw | {"scale": {"workers": 1, "cpus_per_worker": 500.0}}))
    config = benchmark_raw(small_store, tmp_path, {"tuned": str(good), "broken": str(bad)})
    result = run_job(build_run("benchmark", config))
    board = result.table.set_index("method")
    assert set(board.index) == {"majority", "logistic", "knn", "tuned", "broken"}
    assert board.loc["tuned", "n_seeds"] == 2
    assert board.loc["logistic", "accuracy.v1"] > 0.9
    assert board.loc["majority", "accuracy.v1"] == pytest.approx(1 / 3)
    assert board.loc["tuned", "accuracy.v1"] > 0.7
    # a run that failed is shown as failed, never as zero
    assert np.isnan(board.loc["broken", "accuracy.v1"])
    assert board.loc["broken", "n_failed"] == 2
    assert "failed" in result.text
    assert "the run reserves" in result.text
    assert Path(result.umap_path).stat().st_size > 10_000
    assert result.open_command.startswith("mlflow ui --backend-store-uri sqlite:///")

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("benchmark-annotation").experiment_id
    query = f"tags.`mlflow.parentRunId` = '{result.mlflow_run_id}'"
    children = client.search_runs([experiment], query)
    assert len(children) == 10
    assert {c.info.status for c in children} == {"FINISHED", "FAILED"}
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("benchmark-annotation")
    table = mlflow.load_table("tables/leaderboard.json", run_ids=[result.mlflow_run_id])
    assert set(table["method"]) == set(board.index)
    scores = [c.data.metrics["accuracy.v1"] for c in children if "tuned" in c.info.run_name]
    assert np.mean(scores) == pytest.approx(board.loc["tuned", "accuracy.v1"])

    # again: finished cells of the table are kept, the failed one is tried again
    said: list[str] = []
    again = run_job(build_run("benchmark", config), said.append)
    assert again.mlflow_run_id == result.mlflow_run_id
    assert not [line for line in said if line.startswith(("tuned", "logistic"))]
    assert [line for line in said if line.startswith("broken seed 0: failed")]
    pd.testing.assert_frame_equal(
        again.table.set_index("method").loc[["tuned", "knn"], ["accuracy.v1"]],
        board.loc[["tuned", "knn"], ["accuracy.v1"]],
    )


def test_a_table_without_logistic_regression_is_not_made(small_store, tmp_path):
    config = benchmark_raw(small_store, tmp_path, {}) | {"baselines": ["majority", "knn"]}
    with pytest.raises(ConfigError, match=r"lacks logistic; a table of task 'annotation'"):
        run_job(build_run("benchmark", config))


def test_embed_writes_cells_and_a_picture(pretrained, small_store, tmp_path):
    raw = {
        "name": "embed",
        "model": pretrained,
        "data": {"uri": small_store, "obs_filter": "donor == 'd1'"},
        "output": str(tmp_path / "out"),
        "colour_by": ["cell_type"],
    }
    result = run_job(build_run("embed", raw))
    found = ad.read_h5ad(result.path)
    assert found.obsm["X_cellray"].shape == (60, 16)
    assert found.obsm["X_umap"].shape == (60, 2)
    model = load(pretrained)
    cells = known_cells()[found.obs["soma_joinid"].to_numpy()].copy()
    np.testing.assert_allclose(model.embed(cells), found.obsm["X_cellray"], atol=1e-5)
    assert Path(result.umap_path).read_bytes()[:4] == b"\x89PNG"
    assert open_store(small_store).num_cells == 240
