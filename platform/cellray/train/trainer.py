"""The driver's side of a training run: Ray, the run directory, Ray Train, MLflow, the result."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cellray.core.errors import CellrayError, CheckpointError, ConfigError, StoppedError
from cellray.data.corpus import corpus_files
from cellray.data.pipeline import settle_helpers
from cellray.train.caching import with_cache
from cellray.train.checkpoint import export_model, read_manifest, verify
from cellray.train.config import ScaleSection
from cellray.train.job import TrainJob, for_workers
from cellray.train.progress import ReportCallback, watch
from cellray.train.rundir import RunDirectory
from cellray.train.saving import committed, judged_loss, newest_whole
from cellray.train.tracking import Tracker
from cellray.train.worker import train_worker

__all__ = ["TrainResult", "ensure_ray", "fit", "kept_interrupt"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainResult:
    """What a training run leaves behind.

    Attributes:
        name: the run's name.
        run_dir: its directory.
        model_dir: the exported model: the best checkpoint by validation loss where there are
            validation cells, else the last.
        step: the step of that checkpoint.
        metrics: the last report's numbers.
        mlflow_run_id: "" if tracking is off.
        resumed_from_step: 0 for a run that was not interrupted.
    """

    name: str
    run_dir: str
    model_dir: str
    step: int
    metrics: Mapping[str, float]
    mlflow_run_id: str = ""
    resumed_from_step: int = 0


def cpus_needed(scale: ScaleSection) -> float:
    """Logical CPUs a run reserves: workers, their tokenisation actors, one for reading."""
    actors = scale.tokenizer_actors * scale.cpus_per_actor
    return scale.workers * (scale.cpus_per_worker + actors) + 1


def ensure_ray(
    scale: ScaleSection | None = None, *, extra_cpus: float = 0.0, times: int = 1
) -> None:
    """Connect to the cluster that RAY_ADDRESS or a running job names, else start a local Ray.

    A local Ray is given as many logical CPUs as the run reserves, if the machine has fewer cores:
    a small machine then shares its cores instead of waiting for ever.

    Args:
        scale: what a run reserves.
        extra_cpus: reserved besides (the trials of a sweep).
        times: such runs at a time.

    Raises:
        ConfigError: a running cluster is too small for the run; it would starve.
    """
    from cellray.ops.environment import local_ray_environment

    needed = (cpus_needed(scale) if scale else 1.0) * times + extra_cpus
    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(logging_level="warning")
        else:
            os.environ.update(local_ray_environment())
            cpus = max(os.cpu_count() or 1, int(needed + 3.999))
            verbose = os.environ.get("CELLRAY_VERBOSE") == "1"
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=verbose,
                logging_level="info" if verbose else "error",
            )
    have = ray.cluster_resources()
    if scale is None:
        return
    fewest = scale.min_workers or scale.workers  # an elastic run begins with what there is
    needed -= (
        cpus_needed(scale) - cpus_needed(scale.model_copy(update={"workers": fewest}))
    ) * times
    gpus = fewest * scale.gpus_per_worker
    if have.get("CPU", 0) < needed or have.get("GPU", 0) < gpus:
        raise ConfigError(
            f"the run reserves {needed:g} CPUs and {gpus:g} GPUs ({fewest} workers with "
            f"{scale.tokenizer_actors} tokenisation actors each, 1 CPU left for reading), the Ray "
            f"cluster has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs; lower "
            "scale.workers, scale.cpus_per_worker or scale.cpus_per_actor, or add nodes"
        )


@contextmanager
def kept_interrupt() -> Iterator[None]:
    """Put the process's SIGINT handler back: Ray Train and Ray Tune install theirs for good."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, so none is replaced here
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _poll_often() -> None:
    """Have the controller look for reports four times a second.

    A worker's report waits until the controller has taken the one before it, and Ray Train's
    default is one look every 2 seconds: runs that report more often would train at that pace.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")


def _workers(scale: ScaleSection) -> int | tuple[int, int]:
    """How many workers, or from how many to how many."""
    if scale.min_workers and scale.min_workers < scale.workers:
        return scale.min_workers, scale.workers
    return scale.workers


def _trainer(job: TrainJob, run: RunDirectory, callbacks: list[Any]) -> TorchTrainer:
    _poll_often()
    resources: dict[str, float] = {"CPU": job.scale.cpus_per_worker}
    if job.scale.gpus_per_worker:
        resources["GPU"] = job.scale.gpus_per_worker
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": ray.put(job)},
        torch_config=TorchConfig(backend="nccl" if job.device == "cuda" else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=_workers(job.scale),
            use_gpu=job.scale.gpus_per_worker > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=job.scale.resize_interval_s,
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=str(run.path),
            failure_config=FailureConfig(max_failures=job.scale.max_failures),
            callbacks=callbacks,
        ),
    )


def _root_cause(error: BaseException) -> BaseException:
    """The user's own error inside Ray's wrappers, if there is one."""
    seen: BaseException | None = error
    while seen is not None:
        for inner in (getattr(seen, "worker_failures", None) or {}).values():
            cause = getattr(inner, "cause", inner)
            if isinstance(cause, CellrayError):
                return cause
        if isinstance(seen, CellrayError):
            return seen
        seen = seen.__cause__
    return error


def _begin(run: RunDirectory, say: Say, name: str) -> int:
    """The step a run goes on from: what was noted after it is dropped.

    Ray's own list of checkpoints is thrown away: ours is the one that counts, and Ray would refuse
    to start where its list was cut short or names a folder that is gone.
    """
    folder, torn = newest_whole(run.path)
    for text in torn:
        say(f"{name}: {text}; an earlier one is taken")
    step = read_manifest(folder).step if folder is not None else 0
    if step:
        say(f"{name}: resuming from step {step}")
    run.rewind(step)
    (run.path / "checkpoints" / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    return step


def _chosen(run: RunDirectory, *, judged: bool) -> Path:
    """The checkpoint to export: the best by validation loss of those kept, else the last.

    Raises:
        CheckpointError: there is no whole one.
    """
    notes = [n for n in committed(run.path) if (run.path / "checkpoints" / n["name"]).is_dir()]
    if judged:
        notes.sort(key=lambda note: -judged_loss(note))
    for note in reversed(notes):
        folder = run.path / "checkpoints" / str(note["name"])
        try:
            verify(folder)
        except CheckpointError:
            continue
        return folder
    raise CheckpointError(f"the run ended without a whole checkpoint in '{run.path}'")


def fit(
    job: TrainJob,
    run: RunDirectory,
    *,
    tracker: Tracker | None,
    say: Say,
    extra_callbacks: list[Any] | None = None,
) -> TrainResult:
    """Train to the end, from the run's last whole checkpoint if there is one; export the model.

    Raises:
        CellrayError: what a worker found wrong, in its own words.
    """
    ensure_ray(job.scale)
    settle_helpers()
    job = replace(for_workers(with_cache(job, say)), run_dir=str(run.path))
    began = _begin(run, say, job.name)
    uri, run_id = (tracker.uri, tracker.run_id) if tracker else ("", "")
    keep = job.checkpoint.keep_last
    notes = ReportCallback(str(run.progress), uri, run_id, keep_last=keep)
    callbacks = [notes, *(extra_callbacks or [])]
    try:
        with kept_interrupt(), watch(run.progress, job.name, job.steps, say):
            result = _trainer(job, run, callbacks).fit()
    except Exception as error:
        cause = _root_cause(error)
        if cause is not error:
            raise cause from error
        raise
    stopped = (result.return_value or {}).get("stopped")
    if stopped:
        raise StoppedError(f"{job.name}: {stopped}")
    folder = _chosen(run, judged=len(job.data.validation) > 0)
    export_model(folder, run.model, beside=corpus_files(run.path))
    metrics = {k: float(v) for k, v in (result.metrics or {}).items() if k != "reported"}
    return TrainResult(
        job.name,
        str(run.path),
        str(run.model),
        read_manifest(folder).step,
        metrics,
        run_id,
        resumed_from_step=began,
    )


def pick_device(scale: ScaleSection) -> str:
    """``cuda`` when the run reserves GPUs, else ``cpu``.

    Raises:
        ConfigError: GPUs are asked for and torch here is a CPU build; Ray would wait for ever.
    """
    if not scale.gpus_per_worker:
        return "cpu"
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        raise ConfigError(
            f"scale.gpus_per_worker = {scale.gpus_per_worker:g}, but torch {torch.__version__} "
            "is a CPU build; install the CUDA build of the same version, or set it to 0"
        )
    return "cuda"
