"""Benchmarks on real components: tables from MLflow's children, controls, failures, going on."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import ray
from scipy import sparse

from cellray.bench import queue, suite
from cellray.bench.compare import compare
from cellray.bench.entries import entries_of
from cellray.bench.record import read_rows
from cellray.bench.setting import open_setting
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import to_toml
from cellray.runs import build_run, run_job
from helpers_runs import SCGPT, finetune_raw, pretrain_run

pytestmark = pytest.mark.ray

BASELINES = {"majority", "logistic", "knn", "hvg", "harmony"}


@pytest.fixture(scope="module")
def pretrained(small_store, ray_cluster, tmp_path_factory):
    over = {
        "engine": {"name": "torch", "zero_stage": 0},
        "scale": {"workers": 1},
        "train": {"eval_every_steps": 0, "log_every_steps": 12},
        "checkpoint": {"every_steps": 0},
    }
    return run_job(pretrain_run(small_store, tmp_path_factory.mktemp("pre"), **over)).model_dir


def benchmark_raw(uri, folder, methods, **more):
    return {
        "name": "bench",
        "seeds": [0],
        "methods": methods,
        "task": finetune_raw(uri, folder)["task"],
        "data": {"uri": uri},
        "checkpoint": {"dir": str(folder)},
        **more,
    }


def tuning_file(uri, folder, pretrained):
    raw = finetune_raw(uri, folder, init_from=pretrained)
    raw["train"] = {"steps": 30, "log_every_steps": 15, "eval_every_steps": 15}
    file = folder / "tuned.toml"
    file.write_text(to_toml(raw))
    return str(file)


@pytest.fixture(scope="module")
def made(pretrained, small_store, tmp_path_factory):
    """A benchmark with a method that works, one that cannot, and a frozen one."""
    folder = tmp_path_factory.mktemp("bench")
    file = tuning_file(small_store, folder, pretrained)
    broken = folder / "broken.toml"
    raw = finetune_raw(small_store, folder, model=SCGPT, tokenizer={"max_tokens": 32})
    broken.write_text(to_toml(raw | {"optim": {"lr": 1e30, "clip_norm": 0.0}}))
    methods = {
        "tuned": file,
        "broken": str(broken),
        "frozen": {"model": pretrained, "head": "knn"},
    }
    config = benchmark_raw(small_store, folder, methods, concurrent=2)
    return config, run_job(build_run("benchmark", config)), folder


def test_every_method_stands_beside_the_baselines_and_its_own_controls(made):
    _, result, _ = made
    board = result.tables["store"].set_index("method")
    methods = {"tuned", "tuned_scratch", "tuned_random", "frozen", "frozen_random"}
    broken = {"broken", "broken_random"}  # from scratch already
    assert set(board.index) == BASELINES | methods | broken
    assert board.loc["logistic", "accuracy.v1"] > 0.9
    assert board.loc["majority", "accuracy.v1"] == pytest.approx(1 / 3)
    families = board["family"].to_dict()
    assert families["tuned"] == "foundation_ft"
    assert families["frozen"] == "foundation_zs"
    assert families["tuned_scratch"] == "from_scratch"
    assert families["frozen_random"] == "random_init"
    assert board.loc["tuned_scratch", "base_method"] == "tuned"
    # this store was pretrained on, test cells included, and the table says so
    assert board.loc["tuned", "overlap_flag"] == "full"
    assert board.loc["tuned_scratch", "overlap_flag"] == "none"
    assert board.loc["frozen", "overlap_fraction"] == 1.0


def test_a_run_that_failed_is_shown_as_failed_never_as_zero(made):
    _, result, _ = made
    board = result.tables["store"].set_index("method")
    assert np.isnan(board.loc["broken", "accuracy.v1"])
    assert board.loc["broken", "n_failed"] == 1
    assert "failed" in result.text
    assert "the loss is nan" in board.loc["broken", "error"]


def test_the_table_is_the_childrens(made):
    _, result, folder = made
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    parent = client.get_run(result.mlflow_run_ids["store"])
    experiment = client.get_experiment_by_name("benchmark-annotation").experiment_id
    assert parent.info.experiment_id == experiment
    assert parent.data.tags["cellray.dataset"] == "store"
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = {c.info.run_name: c for c in client.search_runs([experiment], query)}
    board = result.tables["store"].set_index("method")
    assert set(children) == {f"{name}-seed0" for name in board.index}
    assert {c.info.status for c in children.values()} == {"FINISHED", "FAILED"}
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("benchmark-annotation")
    table = mlflow.load_table("tables/leaderboard.json", run_ids=[parent.info.run_id])
    assert set(table["method"]) == set(board.index)
    for name in ("tuned", "logistic", "frozen_random"):
        logged = children[f"{name}-seed0"].data.metrics["macro_f1.union.v1"]
        assert logged == board.loc[name, "macro_f1.union.v1"]


def test_answers_are_kept_and_their_hash_is_in_the_row(made):
    _, _, folder = made
    rows = json.loads((folder / "bench" / "store" / "results" / "tuned-seed0.json").read_text())
    answers = folder / "bench" / rows[0]["predictions_uri"]
    assert hashlib.sha256(answers.read_bytes()).hexdigest() == rows[0]["predictions_sha256"]
    frame = pd.read_csv(answers)
    assert list(frame.columns) == ["joinid", "predicted", "confidence"]
    assert len(frame) == 60


def test_again_finished_cells_are_kept_and_the_failed_is_tried_again(made):
    config, result, folder = made
    kept = folder / "bench" / "store" / "results" / "tuned-seed0.json"
    before = kept.stat().st_mtime_ns
    said: list[str] = []
    again = run_job(build_run("benchmark", config), said.append)
    assert again.mlflow_run_ids == result.mlflow_run_ids
    assert kept.stat().st_mtime_ns == before
    assert not [line for line in said if line.startswith(("tuned", "logistic"))]
    assert [line for line in said if line.startswith("broken on store, seed 0: failed")]
    columns = ["accuracy.v1", "macro_f1.union.v1"]
    pd.testing.assert_frame_equal(
        again.tables["store"].set_index("method").loc[["tuned", "knn"], columns],
        result.tables["store"].set_index("method").loc[["tuned", "knn"], columns],
    )


def test_the_page_has_all_tables_and_pictures_in_it(made):
    _, result, _ = made
    page = Path(result.report_path).read_text()
    assert "tuned_scratch" in page
    assert page.count("data:image/png;base64,") >= 4
    assert 'src="http' not in page
    pictures = result.pictures["store"]
    assert any(title.startswith("UMAP") for title in pictures)
    assert any(title.startswith("Confusion matrix: tuned") for title in pictures)
    assert all(Path(path).stat().st_size > 5_000 for path in pictures.values())


def test_compare_draws_the_same_table_from_mlflow(made, tmp_path):
    _, result, folder = made
    said: list[str] = []
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    pictures = list(result.pictures["store"].values())
    (sweep / "sweep.png").write_bytes(Path(pictures[0]).read_bytes())
    facts = {"name": "s1", "metric": "validation/loss", "best": 2, "trials": [{}, {}, {}]}
    (sweep / "trials.json").write_text(json.dumps(facts))
    sources = [str(folder / "bench"), str(sweep)]
    page = compare(sources, said.append, html=str(tmp_path / "c.html"))
    assert "s1: 3 trials by validation/loss, best 2" in page.read_text()
    with pytest.raises(DataError, match="only sweeps are given"):
        compare([str(sweep)], said.append)
    text = "\n".join(said)
    assert "tuned_scratch" in text
    assert page.stat().st_size > 50_000
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    names = [f.path for f in client.list_artifacts(result.mlflow_run_ids["store"], "report")]
    assert "report/compare.html" in names


def test_results_of_another_configuration_are_not_mixed_in(made):
    config, _, _ = made
    changed = {**config, "overrides": ["optim.lr=3e-3"]}
    with pytest.raises(ConfigError, match=r"holds a result of 'tuned' with other settings \(optim"):
        run_job(build_run("benchmark", changed))


def test_a_table_without_logistic_regression_is_not_made(small_store, tmp_path):
    config = benchmark_raw(small_store, tmp_path, {}) | {"baselines": ["majority", "knn"]}
    with pytest.raises(ConfigError, match=r"lacks logistic.*; a table of task 'annotation'"):
        run_job(build_run("benchmark", config))


def test_a_method_that_does_not_fit_the_task_is_refused(pretrained, small_store, tmp_path):
    file = tuning_file(small_store, tmp_path, pretrained)
    task = {**finetune_raw(small_store, tmp_path)["task"], "name": "reference_mapping"}
    task["split"] = {"column": "donor", "test_values": ["d3"]}
    config = benchmark_raw(small_store, tmp_path, {"tuned": file}) | {"task": task}
    with pytest.raises(ConfigError, match="trains nothing: it takes frozen models"):
        run_job(build_run("benchmark", config))
    config = benchmark_raw(small_store, tmp_path, {"knn": {"model": pretrained}})
    with pytest.raises(ConfigError, match="two rows would be called knn"):
        run_job(build_run("benchmark", config))


def test_embeddings_are_framed_by_their_controls(pretrained, small_store, tmp_path):
    config = benchmark_raw(small_store, tmp_path, {"frozen": {"model": pretrained}}) | {
        "name": "embeddings",
        "task": {"name": "embedding", "label": "cell_type", "batch": "donor"},
    }
    board = run_job(build_run("benchmark", config)).tables["store"].set_index("method")
    bio = board["bio_mean.nmi_ari_asw_isolated_clisi.v1"]
    assert bio["celltype_jitter.positive"] > bio["pca"] > bio["noise.negative"]
    assert board.loc["pca", "avg_bio.scgpt_leiden.v1.scaled"] < 1
    assert board.loc["noise.negative", "avg_bio.scgpt_leiden.v1.scaled"] == 0
    # methods without an embedding stand in the table by the probes' folds
    probe = board["accuracy.linear_probe.v1"]
    assert probe["logistic"] > 0.9 > probe["majority"]
    assert np.isnan(board.loc["logistic", "avg_bio.scgpt_leiden.v1"])


@pytest.mark.slow
def test_a_method_tuned_to_integrate_stands_beside_itself_from_scratch(
    pretrained, small_store, ray_cluster, tmp_path
):
    raw = finetune_raw(small_store, tmp_path, init_from=pretrained) | {
        "task": {"name": "integration", "batch": "donor", "num_genes": 40},
        "train": {"steps": 4, "log_every_steps": 4, "eval_every_steps": 4},
    }
    file = tmp_path / "integrate.toml"
    file.write_text(to_toml(raw))
    config = benchmark_raw(small_store, tmp_path, {"integrated": str(file)}) | {
        "task": {"name": "integration", "batch": "donor", "num_genes": 40},
    }
    board = run_job(build_run("benchmark", config)).tables["store"].set_index("method")
    wanted = ["integrated", "integrated_scratch", "integrated_random", "pca", "harmony"]
    assert (board.loc[wanted, "status"] == "ok").all()
    totals = board.loc[wanted, "total_60_40.bio5_batch5.v1"]
    assert totals.between(0, 1).all()
    assert totals["integrated"] != totals["integrated_random"]


def test_a_process_that_dies_is_started_once_more_and_then_has_failed(
    small_store, ray_cluster, tmp_path
):
    config = benchmark_raw(small_store, tmp_path, {}, seeds=[0, 1], tracking={"enabled": False})
    run = build_run("benchmark", config)
    setting = open_setting(run, "store")
    entries = [e for e in entries_of(setting) if e.name in ("majority", "knn")]

    def dying(raw, files, work, parent, here):
        """The majority's process is killed at its second seed, that of kNN at every try."""
        tried = tmp_path / work.entry.name
        first = not tried.exists()
        tried.touch()
        if work.entry.name == "majority" and first:
            queue._work(raw, files, replace(work, seeds=(0,)), parent, here)
        if work.entry.name == "knn" or first:
            os.kill(os.getpid(), signal.SIGKILL)
        return queue._work(raw, files, work, parent, here)

    said: list[str] = []
    todo = queue.Queue(run, {"store": None}, said.append, 2)
    todo._task = ray.remote(dying)
    todo.run(suite._to_do(setting, entries), {"store": setting})
    rows = read_rows(setting, entries)
    assert {(r.seed, r.status) for r in rows if r.method == "majority"} == {(0, "ok"), (1, "ok")}
    failed = [r for r in rows if r.method == "knn"]
    assert [(r.seed, r.status, r.value) for r in failed] == [
        (0, "failed", None),
        (1, "failed", None),
    ]
    assert all("died" in r.error for r in failed)
    once = sorted(line for line in said if line.endswith("its process died; once more"))
    assert [line.split()[0] for line in once] == ["knn", "majority"]
    assert [line for line in said if line.startswith("majority on store, seed 1: macro F1")]
    assert said[-1].startswith("4/4 cells of the tables")


def test_copies_across_the_split_are_an_error(tmp_path):
    from cellray.data.ingest import IngestConfig, ingest
    from helpers_cells import known_cells

    cells = known_cells()
    first = int(np.flatnonzero(cells.obs["donor"].astype(str) == "d1")[0])
    last = int(np.flatnonzero(cells.obs["donor"].astype(str) == "d3")[0])
    counts = cells.X.toarray()
    counts[last] = counts[first]
    cells.X = sparse.csr_matrix(counts)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    uri = str(tmp_path / "store")
    ingest(IngestConfig(files=[str(tmp_path / "cells.h5ad")], uri=uri))
    with pytest.raises(DataError, match="copies|same counts|twin|duplicate"):
        run_job(build_run("benchmark", benchmark_raw(uri, tmp_path, {})))


@pytest.mark.slow
def test_a_killed_benchmark_goes_on_where_it_stood(pretrained, small_store, tmp_path):
    file = tuning_file(small_store, tmp_path, pretrained)
    config = benchmark_raw(small_store, tmp_path, {"tuned": file}) | {"seeds": [0, 1]}
    (tmp_path / "bench.toml").write_text(to_toml(config))
    words = [sys.executable, "-m", "cellray.cli", "benchmark", str(tmp_path / "bench.toml")]
    results = tmp_path / "bench" / "store" / "results"
    process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL)
    started = time.monotonic()
    while not (results / "tuned-seed0.json").is_file():
        assert process.poll() is None
        assert time.monotonic() - started < 400
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {f.name: f.stat().st_mtime_ns for f in results.glob("*.json")}
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = {f.name: f.stat().st_mtime_ns for f in results.glob("*.json")}
    assert {name: after[name] for name in before} == before
    assert set(after) == {f"{n}-seed{s}.json" for n in (*BASELINES, *TUNED) for s in (0, 1)}


TUNED = ("tuned", "tuned_scratch", "tuned_random")
