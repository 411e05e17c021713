"""A training run with its directory and its MLflow run around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from cellray.data.config import DataSection
from cellray.data.corpus import CORPUS, record_corpus
from cellray.infer.load import local_folder
from cellray.train.config import CheckpointSection, TrackingSection
from cellray.train.job import TrainJob
from cellray.train.rules import uneven_shares
from cellray.train.rundir import RunDirectory
from cellray.train.tracking import Tracker
from cellray.train.trainer import TrainResult, fit

__all__ = ["fit_tracked"]

Say = Callable[[str], None]


def _facts(job: TrainJob) -> dict[str, Any]:
    """What MLflow should say of the data, beside the configuration."""
    plan, data = job.data.plan, job.data
    return {
        "data.fingerprint": data.fingerprint,
        "data.num_train_cells": len(plan.joinids),
        "data.num_validation_cells": len(data.validation),
        "data.remainder_cells_per_epoch": plan.remainder_cells,
        "vocab.fingerprint": job.manifest.vocab_fingerprint,
        "vocab.num_genes": len(data.source.vocab),
        "train.total_steps": job.steps,
    }


def _weights_of(config: Mapping[str, Any]) -> str:
    """The folder of the checkpoint whose weights a run starts with; "" if it draws its own."""
    start = str(config.get("init_from") or "")
    return str(local_folder(start)) if start and config.get("init_weights", True) else ""


def _note_corpus(job: TrainJob, run: RunDirectory, say: Say) -> None:
    """Write down what the run trains on, once; the exported model takes it along."""
    if (run.path / CORPUS).is_file():
        return
    data, config = job.data, job.manifest.run
    record_corpus(
        run.path,
        data.source.store,
        np.union1d(data.plan.joinids, data.validation),
        kind="finetune" if config.get("task") else "pretrain",
        run=job.name,
        timestamp=data.timestamp,
        before=_weights_of(config),
        hashes=str(config.get("data", {}).get("corpus_hashes", "auto")),
        say=say,
    )


def pinned(data: DataSection, checkpoint: CheckpointSection, name: str) -> DataSection:
    """The data section of a run that goes on: the stores as they were when it began.

    What others have appended since is not seen, so that a run that was killed resumes on the same
    cells. A run that names its own ``data.timestamp``, or begins anew, is left as it is.
    """
    if data.timestamp or checkpoint.resume == "never":
        return data
    began = RunDirectory(checkpoint.dir, name).read("snapshot.json").get("timestamp", "")
    return data.model_copy(update={"timestamp": began})


def _tracker(
    run: RunDirectory,
    uri: str,
    *,
    experiment: str,
    name: str,
    parent: str | None,
    tags: Mapping[str, str] | None,
) -> Tracker:
    """The run's MLflow run: the one it began with, else a new one."""
    old = run.read("mlflow.json")
    if old.get("uri") == uri:
        tracker = Tracker(uri, old["run_id"])
        tracker.restart()
        return tracker
    tracker = Tracker.start(uri, experiment=experiment, name=name, parent=parent, tags=tags)
    run.write("mlflow.json", {"uri": uri, "run_id": tracker.run_id})
    return tracker


def fit_tracked(
    job: TrainJob,
    run: RunDirectory,
    *,
    tracking: TrackingSection,
    uri: str,
    experiment: str,
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    say: Say,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
    extra_callbacks: list[Any] | None = None,
) -> TrainResult:
    """Enter the run directory, train under an MLflow run, and close both whatever happens.

    A finished run of the same name and configuration is returned as it is.

    Raises:
        CellrayError: as in :func:`cellray.train.trainer.fit`; or another process trains the run.
    """
    for warning in job.data.warnings:
        say(f"warning: {warning}")
    uneven = uneven_shares(
        job.data.plan.share(0, job.scale.workers),
        workers=job.scale.workers,
        cells_global=job.batch.cells_global,
    )
    if uneven:
        say(f"warning: {uneven}")
    if job.data.cut:
        say(f"long cells: {job.data.cut}")
    fingerprints = {
        "vocabulary": job.manifest.vocab_fingerprint,
        "data": job.data.fingerprint,
    }
    with run.held():
        began = run.enter(config, fingerprints, job.checkpoint.resume)
        if not began:
            run.write("snapshot.json", {"timestamp": job.data.timestamp})
        done = run.read("result.json")
        if began and done:
            say(f"{job.name}: already finished at step {done['step']}; nothing to do ({run.path})")
            return TrainResult(**done)
        _note_corpus(job, run, say)
        tracker = None
        if tracking.enabled:
            tracker = _tracker(
                run, uri, experiment=experiment, name=job.name, parent=parent, tags=tags
            )
            tracker.params({**params, **_facts(job)})
            tracker.artifact(run.path / "config.toml")
        status = "FAILED"
        try:
            result = fit(job, run, tracker=tracker, say=say, extra_callbacks=extra_callbacks)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            say(f"{job.name}: interrupted; the same command continues from the last checkpoint")
            raise
        finally:
            if tracker is not None:
                tracker.end(status)
        run.write("result.json", asdict(result))
        if tracker is not None:
            tracker.artifact(Path(result.model_dir) / "manifest.json", "model")
        say(f"{job.name}: model in {result.model_dir} (step {result.step})")
        return replace(result)
