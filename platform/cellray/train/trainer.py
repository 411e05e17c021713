"""The driver's side of a training run: Ray, the run directory, Ray Train, MLflow, the result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.callback import UserCallback

from cellray.core.errors import CellrayError, CheckpointError, ConfigError
from cellray.core.section import flatten, to_toml
from cellray.train.caching import with_cache
from cellray.train.checkpoint import export_model
from cellray.train.config import ScaleSection
from cellray.train.tracking import Tracker
from cellray.train.worker import TrainJob, train_worker

__all__ = ["RunDirectory", "TrainResult", "ensure_ray", "fit", "kept_interrupt", "watch"]

Say = Callable[[str], None]
_FREE_KEYS = ("scale.", "tracking.", "checkpoint.", "train.log_every_steps", "train.eval_cells")


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
    gpus = scale.workers * scale.gpus_per_worker
    if have.get("CPU", 0) < needed or have.get("GPU", 0) < gpus:
        raise ConfigError(
            f"the run reserves {needed:g} CPUs and {gpus:g} GPUs ({scale.workers} workers with "
            f"{scale.tokenizer_actors} tokenisation actors each, 1 CPU left for reading), the Ray "
            f"cluster has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs; lower "
            "scale.workers, scale.cpus_per_worker or scale.cpus_per_actor, or add nodes"
        )


class RunDirectory:
    """``<checkpoint.dir>/<name>``: configuration, progress, checkpoints and the exported model.

    Args:
        root: ``checkpoint.dir``.
        name: the run's name.
    """

    def __init__(self, root: str, name: str) -> None:
        self.path = Path(root).resolve() / name
        self.model = self.path / "model"
        self.progress = self.path / "metrics.jsonl"

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; {} if it is not there."""
        file = self.path / name
        return json.loads(file.read_text()) if file.is_file() else {}

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file of the run, at once."""
        partial = self.path / f"{name}.partial"
        partial.write_text(json.dumps(value, indent=1, default=str))
        os.replace(partial, self.path / name)

    def rewind(self, step: int) -> None:
        """Drop the progress after ``step``, whose steps are trained again."""
        if not self.progress.is_file():
            return
        rows = self.progress.read_text().splitlines(keepends=True)
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step]
        partial = self.progress.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, self.progress)

    def enter(self, config: Mapping[str, Any], fingerprints: Mapping[str, str], mode: str) -> bool:
        """Begin or continue the run; True if it had begun before.

        Args:
            config: the resolved configuration.
            fingerprints: of vocabulary and data.
            mode: ``checkpoint.resume``.

        Raises:
            ConfigError: another configuration was begun under this name.
            CheckpointError: the vocabulary or the data changed since.
        """
        if mode == "never" and self.path.exists():
            aside = next(
                p
                for i in range(1, 10_000)
                if not (p := self.path.with_name(f"{self.path.name}.old{i}")).exists()
            )
            self.path.rename(aside)
        began = self.read("run.json")
        if not began:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "config.toml").write_text(to_toml(config) + "\n")
            self.write("run.json", {"config": config, **fingerprints})
            return False
        self._same_config(began["config"], config)
        for kind, value in fingerprints.items():
            if began[kind] != value:
                raise CheckpointError(
                    f"run '{self.path.name}' was begun with another {kind}: {began[kind][:12]}, "
                    f"now {value[:12]}; its checkpoints do not fit. Restore the data, give the "
                    "run another name, or set checkpoint.resume = 'never' to start anew"
                )
        return True

    def _same_config(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        old, new = flatten(before), flatten(now)
        changed = [
            f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key) and not key.startswith(_FREE_KEYS)
        ]
        if changed:
            raise ConfigError(
                f"a run named '{self.path.name}' exists in {self.path.parent} with another "
                f"configuration ({'; '.join(changed[:6])}); give this run another name, or set "
                "checkpoint.resume = 'never' to move the old one aside"
            )


class ReportCallback(UserCallback):  # type: ignore[misc]
    """On the controller: every report goes to the run's progress file and to MLflow.

    Args:
        progress: path of ``metrics.jsonl``.
        uri: MLflow tracking store, "" for none.
        run_id: the MLflow run.
    """

    def __init__(self, progress: str, uri: str, run_id: str) -> None:
        self._progress, self._uri, self._run_id = progress, uri, run_id
        self._tracker: Tracker | None = None

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Write rank 0's metrics (they are sums over all ranks already)."""
        row = {**metrics[0], "time": time.time(), "saved": checkpoint is not None}
        with open(self._progress, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._uri:
            self._tracker = self._tracker or Tracker(self._uri, self._run_id)
            self._tracker.metrics(metrics[0], step=int(metrics[0]["step"]))


def progress_line(name: str, row: Mapping[str, float], total: int) -> str:
    """One report in words."""
    parts = [
        f"{name} step {int(row['step'])}/{total}",
        f"loss {row['train/loss']:.4f}",
        *([f"validation {row['validation/loss']:.4f}"] if "validation/loss" in row else []),
        f"{row['cells_per_s']:.0f} cells/s",
        f"{row['tokens_per_s']:.0f} tokens/s",
        f"ETA {row['eta_s']:.0f} s",
        *(["checkpoint"] if row.get("saved") else []),
    ]
    return "  ".join(parts)


@contextmanager
def watch(file: Path, name: str, total: int, say: Say) -> Any:
    """Say every new line of a progress file while the body runs."""
    stop = threading.Event()
    start = file.stat().st_size if file.exists() else 0

    def follow() -> None:
        offset = start
        while True:
            last = stop.is_set()
            if file.exists():
                with open(file, encoding="utf-8") as lines:
                    lines.seek(offset)
                    for line in lines:
                        if line.endswith("\n"):
                            offset += len(line.encode())
                            say(progress_line(name, json.loads(line), total))
            if last:
                return
            stop.wait(1.0)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


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


def _trainer(job: TrainJob, run: RunDirectory, callbacks: list[Any]) -> TorchTrainer:
    _poll_often()
    resources: dict[str, float] = {"CPU": job.scale.cpus_per_worker}
    if job.scale.gpus_per_worker:
        resources["GPU"] = job.scale.gpus_per_worker
    best = {}
    if len(job.data.validation):
        best = {
            "checkpoint_score_attribute": "validation/loss",
            "checkpoint_score_order": "min",
        }
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": ray.put(job)},
        torch_config=TorchConfig(backend="nccl" if job.device == "cuda" else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.scale.workers,
            use_gpu=job.scale.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=str(run.path),
            checkpoint_config=CheckpointConfig(num_to_keep=job.checkpoint.keep_last, **best),
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


def _started_at(run: RunDirectory) -> int:
    """Step of the newest committed checkpoint, 0 if there is none."""
    snapshot = run.read("checkpoints/checkpoint_manager_snapshot.json")
    latest = (snapshot.get("latest_checkpoint_result") or {}).get("checkpoint_dir_name")
    if not latest:
        return 0
    manifest = run.read(f"checkpoints/{latest}/manifest.json")
    return int(manifest.get("step", 0))


def fit(
    job: TrainJob,
    run: RunDirectory,
    *,
    tracker: Tracker | None,
    say: Say,
    extra_callbacks: list[Any] | None = None,
) -> TrainResult:
    """Train to the end, from the run's last checkpoint if there is one, and export the model.

    Raises:
        CellrayError: what a worker found wrong, in its own words.
    """
    ensure_ray(job.scale)
    job = with_cache(job, say)
    began = _started_at(run)
    if began:
        say(f"{job.name}: resuming from step {began}")
        run.rewind(began)
    uri, run_id = (tracker.uri, tracker.run_id) if tracker else ("", "")
    callbacks = [ReportCallback(str(run.progress), uri, run_id), *(extra_callbacks or [])]
    try:
        with kept_interrupt(), watch(run.progress, job.name, job.steps, say):
            result = _trainer(job, run, callbacks).fit()
    except Exception as error:
        cause = _root_cause(error)
        if cause is not error:
            raise cause from error
        raise
    if result.checkpoint is None:
        raise CheckpointError(f"run '{job.name}' ended without a checkpoint in {run.path}")
    chosen = result.checkpoint
    if len(job.data.validation) and result.best_checkpoints:
        chosen = min(result.best_checkpoints, key=lambda c: c[1].get("validation/loss", 1e30))[0]
    with chosen.as_directory() as folder:
        export_model(Path(folder), run.model)
        step = int(json.loads((Path(folder) / "manifest.json").read_text())["step"])
    metrics = {k: float(v) for k, v in (result.metrics or {}).items()}
    return TrainResult(
        job.name, str(run.path), str(run.model), step, metrics, run_id, resumed_from_step=began
    )


def remove_checkpoints(run: RunDirectory) -> None:
    """Delete the resumable checkpoints of a finished run; the exported model stays."""
    shutil.rmtree(run.path / "checkpoints", ignore_errors=True)


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
