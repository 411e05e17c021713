"""Pretraining through Ray Train, DeepSpeed and MLflow: finishes, is tracked, survives kills."""

from __future__ import annotations

import signal
from pathlib import Path

import mlflow
import numpy as np
import pytest

from cellray.core.errors import CheckpointError, ConfigError, DataError, TrackingError
from cellray.data.vocab import Vocab
from cellray.infer.load import load
from cellray.ops.show import show
from cellray.runs import run_job
from cellray.train.checkpoint import read_checkpoint
from cellray.train.pretrain import prepare_pretrain
from cellray.train.saving import committed
from helpers_runs import pretrain_run, progress

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def whole(small_store, ray_cluster, tmp_path_factory):
    """One unbroken run; what the others are compared with."""
    folder = tmp_path_factory.mktemp("whole")
    said: list[str] = []
    interrupt = signal.getsignal(signal.SIGINT)
    result = run_job(pretrain_run(small_store, folder), said.append)
    assert signal.getsignal(signal.SIGINT) is interrupt  # Ray Train leaves its own behind
    return result, said


def test_a_run_leaves_model_configuration_and_progress(whole):
    result, said = whole
    rows = progress(result.run_dir)
    # every second step, and where a checkpoint or validation falls
    assert [int(r["step"]) for r in rows] == [2, 4, 6, 8, 10, 12]
    assert rows[-1]["train/loss"] < 0.9 * rows[0]["train/loss"]
    assert [note["step"] for note in committed(result.run_dir)] == [4, 8, 12]
    assert sum("checkpoint of step" in line for line in said) == 3
    assert [r["step"] for r in rows if "validation/loss" in r] == [4, 6, 8, 12]
    assert any("cells/s" in line and "tokens/s" in line and "ETA" in line for line in said)
    manifest, vocab, weights = read_checkpoint(result.model_dir)
    assert manifest.step == result.step
    assert manifest.workers == 2
    assert manifest.vocab_fingerprint == vocab.fingerprint
    assert manifest.run["optim"]["lr"] == 5e-3
    assert all(np.isfinite(w.numpy()).all() for w in weights.values())
    assert Path(result.run_dir, "config.toml").read_text().startswith('name = "pre"')
    assert load(result.run_dir).manifest == manifest


@pytest.mark.slow
def test_packed_batches_train_like_padded_ones(whole, small_store, tmp_path):
    """ZeRO 2 on two workers: the same losses without a single pad token."""
    packed = pretrain_run(small_store, tmp_path, batch={"packing": "packed"})
    rows = progress(run_job(packed).run_dir)
    padded = progress(whole[0].run_dir)
    for one, other in zip(rows, padded, strict=True):
        for name in ("train/loss", "validation/loss"):
            if name in other:
                assert one[name] == pytest.approx(other[name], rel=1e-4)
        assert one["padding_fraction"] == 0.0
        assert other["padding_fraction"] > 0.0


def test_mlflow_holds_parameters_metrics_by_step_and_the_data_fingerprint(whole, small_store):
    from cellray.data.soma import open_store

    result, _ = whole
    uri = f"sqlite:///{Path(result.run_dir).parent / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    run = client.get_run(result.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.005"
    assert run.data.params["data.fingerprint"] == open_store(small_store).fingerprint(
        np.arange(240)
    )
    assert len(run.data.tags["git_commit"]) == 40
    history = client.get_metric_history(result.mlflow_run_id, "train/loss")
    assert [m.step for m in history] == [2, 4, 6, 8, 10, 12]
    assert {a.path for a in client.list_artifacts(result.mlflow_run_id)} >= {"config.toml", "model"}


def test_show_tells_what_a_run_and_a_store_hold(whole, small_store):
    result, _ = whole
    told = "\n".join(show(result.run_dir))
    assert "state: finished" in told
    assert "family: scgpt" in told
    assert "cells: 240" in "\n".join(show(small_store))
    with pytest.raises(DataError, match=r"nothing at '.*modle'\. Did you mean 'model'"):
        show(f"{result.run_dir}/modle")


def test_the_same_command_again_does_nothing(whole, small_store):
    result, _ = whole
    said: list[str] = []
    again = run_job(pretrain_run(small_store, Path(result.run_dir).parent), said.append)
    assert again == result
    assert "already finished at step" in said[-1]


def test_another_configuration_under_the_same_name_is_refused(whole, small_store):
    result, _ = whole
    run = pretrain_run(small_store, Path(result.run_dir).parent, optim={"lr": 1e-3})
    with pytest.raises(ConfigError, match=r"another configuration \(optim.lr: 0.005 -> 0.001\)"):
        run_job(run)


def test_a_checkpoint_with_another_vocabulary_is_refused(whole, small_store, tmp_path):
    result, _ = whole
    other = Vocab.from_genes(["ENSG00000000001"], [""], specials=("<pad>", "<cls>"))
    other.save(tmp_path / "other.json.gz")
    over = {"data": {"vocab": str(tmp_path / "other.json.gz")}, "init_from": result.model_dir}
    with pytest.raises(CheckpointError, match=r"\(1 genes, .*\) is not the one of checkpoint"):
        run_job(pretrain_run(small_store, tmp_path, **over))


def test_sections_that_do_not_fit_the_checkpoint_are_refused_on_the_driver(
    whole, small_store, tmp_path
):
    start = {"init_from": whole[0].model_dir}
    cases = [
        ({"model": {"width": 32}}, CheckpointError, r"does not fit the model: .* \(16,\) in the"),
        (
            {"tokenizer": {"name": "rank"}},
            CheckpointError,
            "tokenizer = 'rank', but the checkpoint",
        ),
        ({"data": {"vocab_genes": 9}}, ConfigError, "chooses the genes of a new vocabulary"),
        ({"objective": {"name": "masked"}}, DataError, "no special token '<mask>'"),
    ]
    for over, kind, text in cases:
        with pytest.raises(kind, match=text):
            prepare_pretrain(pretrain_run(small_store, tmp_path, **start, **over))
    fitting = prepare_pretrain(pretrain_run(small_store, tmp_path, **start))
    assert fitting.job.weights is not None


def test_bad_input_is_found_before_any_work(small_store, tmp_path):
    cases = [
        ({"data": {"uri": str(tmp_path / "stor")}}, DataError, "no store at"),
        ({"data": {"obs_filter": "donor == 'd9'"}}, DataError, "selects none of the 240 cells"),
        ({"data": {"covariates": ["donr"]}}, DataError, "Did you mean 'donor'"),
        ({"batch": {"cells_global": 480}}, ConfigError, "fewer than one global batch of 480"),
        ({"init_from": str(tmp_path / "none")}, CheckpointError, "no checkpoint at"),
        (
            {"tracking": {"mlflow_uri": "http://127.0.0.1:9"}},
            TrackingError,
            "does not answer",
        ),
        ({"scale": {"gpus_per_worker": 1.0}}, ConfigError, "is a CPU build"),
    ]
    for over, kind, text in cases:
        with pytest.raises(kind, match=text):
            run_job(pretrain_run(small_store, tmp_path / "runs", **over))
        assert not (tmp_path / "runs" / "pre").exists()
