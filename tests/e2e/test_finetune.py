"""Fine-tuning, the registered model and the embedding, on real components."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import mlflow
import numpy as np
import pandas as pd
import pytest

import cellray
from cellray.core.errors import ConfigError, DataError
from cellray.data.corpus import overlap, read_corpus
from cellray.data.soma import open_store
from cellray.infer.load import load
from cellray.ops.show import show
from cellray.runs import build_run, run_job
from cellray.train.finetune import predict_cells, prepare_finetune
from cellray.train.prepare import select_cells
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
    over = {"init_from": pretrained, "register_as": "three-types"}
    run = finetune_run(small_store, folder, task={"refuse": {"target_coverage": 0.9}}, **over)
    return run_job(run), f"sqlite:///{folder / 'mlflow.db'}", run


def test_it_learns_the_types_and_scores_the_held_out_donor(tuned):
    result, uri, _ = tuned
    assert result.test["accuracy.v1"] > 0.8  # three types, chance is 1/3
    assert result.test["n_items"] == 60
    run = mlflow.MlflowClient(tracking_uri=uri).get_run(result.trained.mlflow_run_id)
    assert run.data.metrics["test/accuracy.v1"] == result.test["accuracy.v1"]
    assert any(line.startswith("test macro_f1.union.v1") for line in result.lines())


def test_the_best_checkpoint_by_validation_is_exported(tuned):
    result, *_ = tuned
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


def test_test_cells_are_answered_in_files_and_pictures(tuned):
    result, uri, run = tuned
    folder = Path(result.trained.run_dir) / "test"
    table = pd.read_csv(folder / "predictions.csv")
    assert len(table) == 60
    assert table["cell"].str.fullmatch(r"cell\d+").all()
    truth = known_cells().obs["cell_type"].astype(str)
    assert table["truth"].tolist() == truth[table["cell"]].tolist()
    assert (table["truth"] == table["predicted"]).mean() == result.test["accuracy.v1"]
    cutoff = load(result.trained.model_dir).cutoff
    assert cutoff > 1 / 3
    assert result.test["n_refused"] == (table["confidence"] < cutoff).sum()
    assert table["refused"].sum() == result.test["n_refused"]
    prepared = prepare_finetune(run)
    _, confidence = predict_cells(
        load(result.trained.model_dir), prepared, prepared.split.validation
    )
    assert np.mean(confidence >= cutoff) >= 0.9 > np.mean(confidence > cutoff)
    for name in ("confusion.png", "coverage.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    client = mlflow.MlflowClient(tracking_uri=uri)
    kept = {f.path for f in client.list_artifacts(result.trained.mlflow_run_id, "test")}
    assert kept == {f"test/{n}" for n in ("predictions.csv", "confusion.png", "coverage.png")}
    logged = client.get_run(result.trained.mlflow_run_id).data
    assert logged.metrics["test/aurc.v1"] == result.test["aurc.v1"]
    assert logged.metrics["train/accuracy_after"] == result.train_accuracy > 0.8
    assert 0 < logged.metrics["validation/macro_f1"] <= 1
    assert int(logged.params["n_params_total"]) == result.params["n_params_total"]
    assert result.params["n_params_trainable"] < result.params["n_params_total"]  # no decoder


def test_the_registered_model_annotates_new_cells(tuned):
    result, uri, _ = tuned
    assert result.registered == "models:/three-types/1"
    mlflow.set_tracking_uri(uri)
    there = cellray.load(result.registered).annotate(shuffled_cells(), refuse_below=0.0)
    here = cellray.load(result.trained.model_dir).annotate(shuffled_cells(), refuse_below=0.0)
    pd.testing.assert_frame_equal(there, here)
    truth = shuffled_cells().obs["cell_type"].astype(str).tolist()
    assert np.mean([a == b for a, b in zip(truth, here["label"], strict=True)]) > 0.7
    client = mlflow.MlflowClient(tracking_uri=uri)
    version = client.get_model_version("three-types", "1")
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    values = {metric.key: metric.value for metric in logged.metrics}
    assert values["test/accuracy.v1"] == result.test["accuracy.v1"]
    assert (
        values["validation/accuracy"]
        == load(result.trained.model_dir).manifest.metrics["validation/accuracy"]
    )


def test_a_finished_run_is_scored_again_and_not_registered_twice(tuned):
    result, uri, run = tuned
    said: list[str] = []
    again = run_job(run, said.append)
    assert "already finished" in "".join(said)
    assert again == result
    versions = mlflow.MlflowClient(tracking_uri=uri).search_model_versions("name='three-types'")
    assert [v.version for v in versions] == ["1"] or [v.version for v in versions] == [1]


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


def test_a_model_says_what_it_has_seen(pretrained, tuned, small_store):
    """The corpus lies beside the exported model; fine-tuning takes it over and adds its own."""
    base, result = read_corpus(pretrained), read_corpus(tuned[0].trained.model_dir)
    assert [(s.kind, s.num_cells, s.num_hashes) for s in base.stages] == [("pretrain", 240, 240)]
    assert base.folder == Path(pretrained)
    assert [(s.kind, s.num_cells) for s in result.stages] == [("pretrain", 240), ("finetune", 180)]
    assert result.complete
    cells = select_cells(
        build_run("finetune", finetune_raw(small_store, Path("."), init_from="x")).data
    )
    found = overlap(pretrained, cells, np.arange(60))
    assert (found.flag, found.fraction) == ("full", 1.0)
    assert any("seen in pretrain 'pre': 240 cells" in line for line in show(pretrained))
    step = Path(result.folder).parent / "checkpoints" / committed(result.folder.parent)[-1]["name"]
    assert [s.kind for s in read_corpus(step).stages] == ["pretrain", "finetune"]
