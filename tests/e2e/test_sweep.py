"""Sweeps of whole fine-tuning runs: killed and gone on with, stopped early, never at test cells."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import mlflow
import numpy as np
import pytest

from cellray.core.errors import ConfigError
from cellray.core.section import read_toml, to_dict, to_toml
from cellray.data.ingest import IngestConfig, ingest
from cellray.runs import build_run, load_run, run_job
from cellray.train.finetune import prepare_finetune
from cellray.tune.ledger import Ledger
from cellray.tune.sweep import check_sweep
from helpers_cells import known_cells
from helpers_runs import SCGPT, finetune_raw, progress

pytestmark = pytest.mark.ray

SCRATCH = {"model": SCGPT, "tokenizer": {"max_tokens": 32}}


def write_base(uri, folder, **train):
    raw = finetune_raw(uri, folder) | SCRATCH
    raw["train"] = {"steps": 24, "eval_every_steps": 6} | train
    path = folder / "base.toml"
    path.write_text(to_toml(raw))
    return str(path)


def sweep_raw(base, folder, **over):
    raw = {
        "name": "sweep",
        "base": base,
        "search": {"optim.lr": [1e-6, 1e-2]},
        "algorithm": "grid",
        "checkpoint": {"dir": str(folder / "runs")},
    }
    return raw | over


def children_of(folder, run_id):
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tune").experiment_id
    query = f"tags.`mlflow.parentRunId` = '{run_id}'"
    return client, client.search_runs([experiment], query)


def kill(driver):
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()


def start(config, log):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    return subprocess.Popen(
        [sys.executable, "-m", "cellray.cli", "tune", str(config)],
        env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def until(holds, driver, seconds):
    end = time.monotonic() + seconds
    while not holds():
        assert driver.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.2)


def files_of(folder):
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_sweep_goes_on_without_repeating_what_was_done(small_store, tmp_path):
    """SIGKILL once a trial has finished and the next one has a checkpoint; the same command."""
    base = write_base(small_store, tmp_path, steps=240, eval_every_steps=12)
    raw = sweep_raw(base, tmp_path, search={"optim.lr": [1e-2, 3e-3, 1e-3]}, scheduler="none")
    config = tmp_path / "sweep.toml"
    config.write_text(to_toml(raw))
    home = tmp_path / "runs" / "sweep"
    ledger = Ledger(home / "trials")
    second = home / "trials" / "trial001"
    with open(tmp_path / "first.log", "w") as log:
        driver = start(config, log)
        try:
            notes = second / "checkpoints.jsonl"
            until(lambda: notes.is_file() and notes.read_text().count("\n") >= 3, driver, 500)
        finally:
            kill(driver)
    assert ledger.state(0) == "finished"
    assert ledger.state(1) == "not finished"
    parent = json.loads((home / "mlflow.json").read_text())["run_id"]
    client, children = children_of(tmp_path, parent)
    assert "RUNNING" in {c.info.status for c in children}  # nobody could close them
    before = files_of(home / "trials" / "trial000")
    saved = max(json.loads(line)["step"] for line in notes.read_text().splitlines())

    with open(tmp_path / "second.log", "w") as log:
        again = start(config, log)
        try:
            assert again.wait(500) == 0, (tmp_path / "second.log").read_text()
        finally:
            if again.poll() is None:
                kill(again)
    said = (tmp_path / "second.log").read_text()
    assert "goes on; 1 of 3 trials done" in said
    assert "trial 0 starts" not in said
    assert "trial 1 goes on" in said
    assert files_of(home / "trials" / "trial000") == before
    for trial in range(3):
        steps = [row["step"] for row in progress(home / "trials" / f"trial{trial:03d}")]
        assert steps == sorted(set(steps))
        assert steps[-1] == 240
        assert ledger.state(trial) == "finished"
    result = json.loads((second / "result.json").read_text())
    assert result["resumed_from_step"] >= saved >= 36
    assert json.loads((home / "mlflow.json").read_text())["run_id"] == parent
    assert client.get_run(parent).info.status == "FINISHED"
    _, children = children_of(tmp_path, parent)
    assert sorted(c.data.tags["cellray.trial"] for c in children) == ["0", "1", "2"]
    assert {c.info.status for c in children} == {"FINISHED"}

    # a third time: nothing to do
    third = run_job(load_run("tune", config))
    assert third.complete
    assert third.mlflow_run_id == parent
    assert files_of(home / "trials" / "trial000") == before
    best = load_run("finetune", third.best_config)
    assert best.optim.lr == third.table.set_index("trial").loc[third.best_trial, "optim.lr"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_interrupted_sweep_says_that_it_can_go_on_and_a_time_limit_ends_it(
    small_store, tmp_path
):
    base = write_base(small_store, tmp_path, steps=16000, eval_every_steps=80)
    raw = sweep_raw(base, tmp_path, scheduler="none")
    config, log = tmp_path / "sweep.toml", tmp_path / "log"
    config.write_text(to_toml(raw))
    home = tmp_path / "runs" / "sweep"
    with open(log, "w") as out:
        driver = start(config, out)
        try:
            until(lambda: "trial 0 report 2/200" in log.read_text(), driver, 500)
            driver.send_signal(signal.SIGINT)
            assert driver.wait(120) == 130
        finally:
            if driver.poll() is None:
                kill(driver)
    said = log.read_text()
    assert "interrupted; trials that run are stopped, a second Ctrl-C does not wait" in said
    assert "0 of 2 trials done" in said.splitlines()[-2]
    assert "the same command goes on from here" in said.splitlines()[-2]
    parent = json.loads((home / "mlflow.json").read_text())["run_id"]
    client, children = children_of(tmp_path, parent)
    assert [c.info.status for c in children] == ["KILLED"]
    assert client.get_run(parent).info.status == "KILLED"
    reached = json.loads((home / "trials.json").read_text())["trials"][0]["reports"]
    assert reached >= 2

    config.write_text(to_toml(raw | {"time_limit_s": 120.0}))
    with open(log, "w") as out:
        assert start(config, out).wait(500) == 0
    said = log.read_text()
    assert "trial 0 goes on" in said
    assert "time limit of 120 s reached; trials that run are stopped" in said
    assert "best: trial 0, validation/loss = " in said
    assert "some trials have not finished; the same command goes on with them" in said
    facts = json.loads((home / "trials.json").read_text())
    assert facts["best"] == 0
    assert facts["trials"][0]["state"] == "not finished"
    assert facts["trials"][0]["reports"] > reached
    _, children = children_of(tmp_path, parent)
    assert {c.info.status for c in children} == {"KILLED"}
    assert client.get_run(parent).info.status == "FINISHED"


def test_failed_trials_are_shown_and_the_best_file_is_taken(small_store, ray_cluster, tmp_path):
    base = write_base(small_store, tmp_path)
    # a vocabulary that is not there is met in the trial: shown as failed, and the sweep goes on
    search = {"optim.lr": [3e-2, 1e-9], "data.vocab": ["store", str(tmp_path / "gone.json")]}
    over = {"search": search, "concurrent": 2}
    interrupt = signal.getsignal(signal.SIGINT)
    said: list[str] = []
    result = run_job(build_run("tune", sweep_raw(base, tmp_path, **over)), said.append)
    assert signal.getsignal(signal.SIGINT) is interrupt
    table = result.table.set_index("trial")
    assert table["optim.lr"].tolist() == [3e-2, 3e-2, 1e-9, 1e-9]
    assert table["state"].tolist()[1::2] == ["failed", "failed"]
    assert all("gone.json" in text for text in table["error"][1::2])
    assert table["validation/loss"].isna().tolist() == [False, True, False, True]
    assert set(table["state"][0::2]) <= {"finished", "stopped early"}
    assert table.loc[result.best_trial, "state"] == "finished"
    assert any(line.startswith("trial 1 failed: ") and "gone.json" in line for line in said)
    assert any("trials done  best" in line and "ETA" in line for line in said)
    home = tmp_path / "runs" / "sweep"
    assert (home / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    facts = json.loads((home / "trials.json").read_text())
    assert facts["best"] == result.best_trial
    assert [t["trial"] for t in facts["trials"]] == [0, 1, 2, 3]
    client, children = children_of(tmp_path, result.mlflow_run_id)
    ended = {c.data.tags["cellray.trial"]: c.info.status for c in children}
    assert sorted(ended) == ["0", "1", "2", "3"]
    assert (ended["1"], ended["3"]) == ("FAILED", "FAILED")
    assert "RUNNING" not in ended.values()
    assert not [name for c in children for name in c.data.metrics if name.startswith("test")]
    assert client.get_run(result.mlflow_run_id).info.status == "FINISHED"
    files = {f.path for f in client.list_artifacts(result.mlflow_run_id)}
    assert {"best.toml", "sweep.png", "trials.csv", "trials.json", "tables"} <= files

    best = load_run("finetune", result.best_config)
    assert to_dict(best)["optim"]["lr"] == table.loc[result.best_trial, "optim.lr"]
    assert best.checkpoint.dir == str(tmp_path / "runs")
    assert read_toml(result.best_config)["name"] == "sweep-best"
    assert prepare_finetune(best).job.steps == 24  # it is taken as it is; run below


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_population_hands_on_weights(small_store, ray_cluster, tmp_path):
    """The trial that cannot learn takes over the weights of the one that does, and goes on."""
    base = write_base(small_store, tmp_path, steps=600, eval_every_steps=30)
    over = {
        "search": {"optim.lr": [1e-9, 1e-2]},
        "scheduler": "pbt",
        "trials": 2,
        "concurrent": 2,
        "exploit_fraction": 0.5,
    }
    said: list[str] = []
    result = run_job(build_run("tune", sweep_raw(base, tmp_path, **over)), said.append)
    assert result.complete
    home = tmp_path / "runs" / "sweep"
    ledger = Ledger(home / "trials")
    facts = json.loads((home / "trials.json").read_text())
    changes = {t["trial"]: t["changes"] for t in facts["trials"]}
    first = changes[0][0]
    assert (first["from"], first["step"] % 30) == (1, 0)
    assert f"trial 0 takes over the weights of trial 1 at step {first['step']}" in "\n".join(said)
    # the run directory it goes on in begins with the other's validation, bit for bit
    donor = {row["step"]: row for row in progress(home / "trials" / "trial001")}
    rows = {row["step"]: row for row in progress(home / "trials" / "trial000.1")}
    at = first["step"]
    assert rows[at]["validation/loss"] == donor[at]["validation/loss"]
    assert max(rows) == 600 or len(changes[0]) > 1  # goes on, if only to take over again
    assert ledger.state(0) == ledger.state(1) == "finished"
    assert max(row["step"] for row in progress(ledger.folder(0))) == 600
    before = [row["validation/loss"] for row in progress(home / "trials" / "trial000")
              if "validation/loss" in row]  # fmt: skip
    table = result.table.set_index("trial")
    assert table.loc[0, "validation/loss"] < min(before)
    _, children = children_of(tmp_path, result.mlflow_run_id)
    assert {c.info.status for c in children} == {"FINISHED"}
    taken = next(c for c in children if c.data.tags["cellray.trial"] == "0")
    assert any(tag.startswith("cellray.took_over.") for tag in taken.data.tags)
    assert load_run("finetune", result.best_config).optim.lr in (1e-9, 1e-2)
    assert (home / "sweep.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_optuna_proposes_from_what_trials_have_reported(small_store, ray_cluster, tmp_path):
    base = write_base(small_store, tmp_path, steps=6, eval_every_steps=3)
    over = {
        "search": {"optim.lr": {"low": 1e-6, "high": 1e-2, "scale": "log"}},
        "algorithm": "optuna",
        "scheduler": "none",
        "trials": 6,
        "concurrent": 2,
    }
    sweep = build_run("tune", sweep_raw(base, tmp_path, **over))
    result = run_job(sweep)
    assert result.complete
    rates = result.table["optim.lr"].tolist()
    assert len(set(rates)) == 6
    assert all(1e-6 <= rate <= 1e-2 for rate in rates)
    assert result.best_value == result.table["validation/loss"].min()
    best = load_run("finetune", result.best_config)
    assert best.optim.lr == rates[result.best_trial]
    tuned = run_job(best)
    assert tuned.trained.metrics["step"] == 6
    assert 0 <= tuned.test["accuracy.v1"] <= 1
    before = files_of(tmp_path / "runs" / "sweep" / "trials")
    more = build_run("tune", sweep_raw(base, tmp_path, **over | {"trials": 7}))
    again = run_job(more)  # one more: those that ended stay as they are
    assert again.table["optim.lr"].tolist()[:6] == rates
    after = files_of(tmp_path / "runs" / "sweep" / "trials")
    kept = {p: t for p, t in before.items() if p.parts[-2].startswith("trial00")}
    assert kept
    assert {p: after[p] for p in kept} == kept


@pytest.mark.slow
def test_a_trial_never_looks_at_test_cells(small_store, ray_cluster, tmp_path):
    """Other labels and other counts of the test cells change nothing that a sweep sees."""
    planted = known_cells()
    test = (planted.obs["donor"] == "d3").to_numpy()
    assert test.sum() == 60
    planted.obs["cell_type"] = np.where(test, "planted", planted.obs["cell_type"].astype(str))
    counts = planted.X.toarray() if hasattr(planted.X, "toarray") else planted.X.copy()
    counts[test] = np.random.default_rng(0).permutation(counts[test], axis=1) * 3
    planted.X = counts
    planted.write_h5ad(tmp_path / "planted.h5ad")
    uri = str(tmp_path / "planted")
    ingest(IngestConfig(files=[str(tmp_path / "planted.h5ad")], uri=uri))
    seen = []
    for store in (small_store, uri):
        folder = tmp_path / f"of-{len(seen)}"
        folder.mkdir()
        base = write_base(store, folder, steps=6, eval_every_steps=3)
        raw = sweep_raw(base, folder, search={"optim.lr": [1e-2]}, scheduler="none")
        run_job(build_run("tune", raw))
        facts = json.loads((folder / "runs" / "sweep" / "trials.json").read_text())
        seen.append(facts["trials"][0]["curve"])
    assert [step for step, _ in seen[0]] == [3, 6]
    assert seen[0] == seen[1]


def test_trials_that_do_not_fit_the_cluster_side_by_side(small_store, ray_cluster, tmp_path):
    base = write_base(small_store, tmp_path)
    search = {"optim.lr": {"low": 1e-4, "high": 1e-2, "points": 9}, "scale.workers": [1, 2]}
    sweep = sweep_raw(base, tmp_path, search=search, concurrent=9)
    text = (
        r"the sweep reserves 40\.5 CPUs and 0 GPUs: 9 trials at a time, each 4 CPUs .* has 8 CPUs"
    )
    with pytest.raises(ConfigError, match=text):
        run_job(build_run("tune", sweep))


def test_a_sweep_without_validation_cells_is_refused(small_store, tmp_path):
    base = write_base(small_store, tmp_path)
    over = {"overrides": ["task.split.validation_fraction=0.0"]}
    with pytest.raises(ConfigError, match="sets no validation cells apart"):
        check_sweep(build_run("tune", sweep_raw(base, tmp_path, **over)))


def test_a_sweep_over_an_unknown_key_is_refused(small_store, tmp_path):
    base = write_base(small_store, tmp_path)
    sweep = sweep_raw(base, tmp_path, search={"optim.lrr": [1.0]})
    with pytest.raises(ConfigError, match=r"unknown key 'optim.lrr'\. Did you mean 'lr'"):
        run_job(build_run("tune", sweep))
