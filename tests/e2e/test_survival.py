"""Runs that are killed, torn, starved of disk or fed nonsense: they go on, or say why not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from cellray.core.errors import CheckpointError, StoppedError
from cellray.core.section import merge, to_toml
from cellray.runs import run_job
from cellray.train.cell_log import read_cell_log
from cellray.train.pretrain import prepare_pretrain
from cellray.train.saving import committed
from helpers_runs import SCGPT, pretrain_raw, pretrain_run, progress

pytestmark = pytest.mark.ray

# More than an epoch (18 steps), dropout, packed batches cut by tokens, every step reported.
LONG = {
    "model": {**SCGPT, "dropout": 0.2},
    "batch": {"packing": "packed", "tokens_micro": 70},
    "train": {"steps": 22, "log_every_steps": 1, "eval_every_steps": 0, "log_cells": True},
    "checkpoint": {"every_steps": 5},
}
# The same without what depends on the number of workers.
PLAIN = merge(LONG, {"model": {"dropout": 0.0}})


def losses(run_dir):
    return {int(r["step"]): r["train/loss"] for r in progress(run_dir)}


def training_workers():
    return [
        p.pid
        for p in psutil.process_iter(["name", "cmdline"])
        if any("RayTrainWorker" in word for word in p.info["cmdline"] or [])
    ]


def kill_a_worker():
    """Kill one training worker the hard way; True if there was one."""
    workers = training_workers()
    if workers:
        os.kill(workers[0], signal.SIGKILL)
    return bool(workers)


def assert_every_cell_once(run_dir, run):
    """Set arithmetic over what the ranks logged: an epoch is the training cells, each once."""
    plan = prepare_pretrain(run).job.data.plan
    log = read_cell_log(run_dir)
    assert list(log) == list(range(run.train.steps))
    for step, entry in log.items():
        cursor = plan.cursor(step)
        planned = plan.rows(cursor.epoch, cursor.position, cursor.position + 1)[0]
        assert sorted(entry["cells"]) == list(range(entry["world"]))
        seen = np.concatenate([entry["cells"][rank] for rank in range(entry["world"])])
        assert np.array_equal(np.sort(seen), np.sort(planned)), f"step {step}"
    first = [c for s in range(plan.batches_per_epoch) for c in log[s]["cells"].values()]
    delivered = np.concatenate(first)
    assert len(np.unique(delivered)) == len(delivered) == len(plan.joinids) - plan.remainder_cells
    assert np.isin(delivered, plan.joinids).all()


@pytest.fixture(scope="module")
def unbroken(small_store, ray_cluster, tmp_path_factory):
    """The run that nobody kills."""
    run = pretrain_run(small_store, tmp_path_factory.mktemp("unbroken"), **LONG)
    return run, run_job(run)


@pytest.fixture(scope="module")
def plain(small_store, ray_cluster, tmp_path_factory):
    """The same without dropout, for runs on other numbers of workers."""
    return run_job(pretrain_run(small_store, tmp_path_factory.mktemp("plain"), **PLAIN))


def test_an_unbroken_run_trains_on_every_cell_of_an_epoch_once(unbroken):
    run, result = unbroken
    assert_every_cell_once(result.run_dir, run)
    assert list(losses(result.run_dir)) == list(range(1, 23))
    assert [n["step"] for n in committed(result.run_dir)] == [5, 10, 15, 20, 22]
    assert all(r["padding_fraction"] == 0 for r in progress(result.run_dir))


@pytest.mark.slow
def test_a_killed_worker_leaves_the_loss_curve_as_it_was(unbroken, small_store, tmp_path):
    """Step by step, to the last digit, with dropout; no cell twice, none left out."""
    run, result = unbroken
    killed: list[bool] = []

    def kill_once(line: str) -> None:
        if "checkpoint of step 10" in line and not killed and kill_a_worker():
            killed.append(True)

    broken = run_job(pretrain_run(small_store, tmp_path, **LONG), kill_once)
    assert killed
    assert losses(broken.run_dir) == losses(result.run_dir)
    steps = [int(r["step"]) for r in progress(broken.run_dir)]
    assert steps == list(range(1, 23))  # what was trained again is reported once
    assert_every_cell_once(broken.run_dir, run)


def kill_driver(config: Path, run_dir: Path, *, at_step: int) -> None:
    """Start a run as a command and kill driver and workers once a checkpoint is noted."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    driver = subprocess.Popen(
        [sys.executable, "-m", "cellray.cli", "pretrain", str(config)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not any(note["step"] >= at_step for note in committed(run_dir)):
        assert driver.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    while training_workers():  # they outlive their driver by a moment, and may commit once more
        assert time.monotonic() < deadline
        time.sleep(0.1)


def go_on(config: Path) -> str:
    """Give a command (again); what it said."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    done = subprocess.run(
        [sys.executable, "-m", "cellray.cli", "pretrain", str(config)],
        env=environment, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_killed_driver_and_a_torn_checkpoint_and_other_workers(plain, small_store, tmp_path):
    """ZeRO 2 on two workers is killed, its newest checkpoint torn; ZeRO 3 on three goes on."""
    config = tmp_path / "run.toml"
    config.write_text(to_toml(pretrain_raw(small_store, tmp_path / "runs", **PLAIN)))
    run_dir = tmp_path / "runs" / "pre"
    kill_driver(config, run_dir, at_step=10)
    newest = run_dir / "checkpoints" / committed(run_dir)[-1]["name"]
    file = newest / "engine" / "optimizer-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    others = {"scale": {"workers": 3}, "engine": {"zero_stage": 3}}
    config.write_text(to_toml(pretrain_raw(small_store, tmp_path / "runs", **merge(PLAIN, others))))
    whole = int(committed(run_dir)[-2]["step"])
    said = go_on(config)
    assert "is torn: 'engine/optimizer-00001-of-00002.safetensors' is not what rank 1 wrote" in said
    assert f"resuming from step {whole}" in said
    got, expected = losses(run_dir), losses(plain.run_dir)
    assert list(got) == list(expected)
    for step, loss in expected.items():
        assert got[step] == pytest.approx(loss, rel=1e-5), step
    run = pretrain_run(small_store, tmp_path / "runs", **PLAIN)
    assert_every_cell_once(run_dir, run)
    assert {e["world"] for e in read_cell_log(run_dir).values()} == {2, 3}


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_killed_run_goes_on_with_another_number_of_workers(
    plain, small_store, tmp_path, before, after
):
    config = tmp_path / "run.toml"
    first, then = (merge(PLAIN, {"scale": {"workers": n}}) for n in (before, after))
    config.write_text(to_toml(pretrain_raw(small_store, tmp_path / "runs", **first)))
    kill_driver(config, tmp_path / "runs" / "pre", at_step=5)
    config.write_text(to_toml(pretrain_raw(small_store, tmp_path / "runs", **then)))
    assert "resuming from step" in go_on(config)
    got, expected = losses(tmp_path / "runs" / "pre"), losses(plain.run_dir)
    assert list(got) == list(expected)
    for step, loss in expected.items():
        assert got[step] == pytest.approx(loss, rel=1e-5), step


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_cells(small_store, tmp_path):
    """A learning rate beyond reason: the weights overflow, and the run does not go on with them."""
    run = pretrain_run(
        small_store,
        tmp_path,
        optim={"lr": 1e30, "warmup_steps": 0, "clip_norm": 0.0},
        train={"steps": 12, "eval_every_steps": 0, "log_every_steps": 1},
        checkpoint={"every_steps": 0},
        engine={"name": "torch", "zero_stage": 0},
    )
    with pytest.raises(StoppedError, match=r"pre: step \d+: the (loss|gradient).*bad_steps'; look"):
        run_job(run)
    files = sorted((tmp_path / "pre" / "bad_steps").glob("*.json"))
    assert [f.name[-15:] for f in files] == ["rank-00000.json", "rank-00001.json"]
    bad = [json.loads(f.read_text()) for f in files]
    ids = [i for b in bad for m in b["micro_batches"] for i in m["cell_ids"]]
    plan = prepare_pretrain(run).job.data.plan
    assert sorted(ids) == sorted(plan.rows(0, bad[0]["step"], bad[0]["step"] + 1)[0].tolist())
    assert not (tmp_path / "pre" / "model").exists()


def mounted(folder: Path, megabytes: int) -> bool:
    """A small disk at ``folder``; False where this user may not make one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_a_full_disk_stops_the_run_with_the_last_checkpoint_whole(small_store, tmp_path):
    disk = tmp_path / "disk"
    if sys.platform != "linux" or not mounted(disk, 4):
        pytest.skip("not run: a small disk cannot be mounted here")
    try:
        run = pretrain_run(
            small_store,
            disk,
            train={"steps": 30, "eval_every_steps": 0},
            checkpoint={"every_steps": 3, "keep_last": 9},
            tracking={"mlflow_uri": f"sqlite:///{tmp_path / 'mlflow.db'}"},
        )

        def fill(line: str) -> None:
            if "checkpoint of step 3 " in line:
                space = os.statvfs(disk)
                (disk / "junk").write_bytes(b"x" * (space.f_bavail * space.f_frsize - 20_000))

        with pytest.raises(StoppedError, match=r"cannot write the checkpoint of step \d+ .*free"):
            run_job(run, fill)
        steps = [int(note["step"]) for note in committed(disk / "pre")]
        assert steps[0] == 3
        (disk / "junk").unlink()
        result = run_job(run)
        assert result.resumed_from_step == steps[-1]
        assert result.step == 30
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


@pytest.mark.slow
def test_everything_at_once(small_store, tmp_path):
    """bf16, recomputed and compiled blocks, offload, an automatic micro-batch, a trace."""
    run = pretrain_run(
        small_store,
        tmp_path,
        batch={"tokens_micro": "auto", "packing": "packed"},
        train={
            "steps": 6, "precision": "bf16", "activation_checkpointing": True, "compile": True,
            "profile_steps": [2, 3],
        },
        engine={"zero_stage": 2, "offload": "optimizer"},
    )  # fmt: skip
    result = run_job(run)
    rows = progress(result.run_dir)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert rows[-1]["memory_bytes"] > 1e8
    found = json.loads(Path(result.run_dir, "tokens_micro.json").read_text())["tokens_micro"]
    assert found >= 64
    trace = sorted(p.name for p in Path(result.run_dir, "profile").iterdir())
    assert trace == ["steps-2-3.trace.json.gz", "steps-2-3.txt"]
    assert "aten::" in Path(result.run_dir, "profile", "steps-2-3.txt").read_text()


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_torn_asks_what_to_do(small_store, tmp_path):
    over = {"train": {"steps": 4, "eval_every_steps": 0}, "checkpoint": {"every_steps": 2}}
    result = run_job(pretrain_run(small_store, tmp_path, **over))
    for note in committed(result.run_dir):
        manifest = Path(result.run_dir, "checkpoints", note["name"], "manifest.json")
        manifest.write_text("{")
    Path(result.run_dir, "result.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is whole: .*resume = 'never'"):
        run_job(pretrain_run(small_store, tmp_path, **over))
    anew = merge(over, {"checkpoint": {"resume": "never"}})
    assert run_job(pretrain_run(small_store, tmp_path, **anew)).step == 4
