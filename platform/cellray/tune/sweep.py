"""Ray Tune sweeps of whole fine-tuning runs, with one MLflow parent and a child per trial."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from ray import tune as ray_tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from cellray.core.errors import ConfigError, DataError
from cellray.core.section import apply_overrides, flatten, read_toml, to_dict, to_toml
from cellray.train.finetune import finetune, prepare_finetune
from cellray.train.rundir import RunDirectory
from cellray.train.tracking import Tracker, check_tracking, tracking_uri
from cellray.train.trainer import ensure_ray, kept_interrupt
from cellray.tune.space import parse_space, sample

if TYPE_CHECKING:
    from cellray.runs import FinetuneRun, TuneRun

__all__ = ["TuneResult", "check_sweep", "tune"]

Say = Callable[[str], None]
_TRIAL_CPUS = 0.5


@dataclass(frozen=True)
class TuneResult:
    """What a sweep found.

    Attributes:
        best_config: TOML file that ``cellray finetune`` takes as it is.
        best_trial: its number.
        best_value: the metric of the best trial.
        metric: what trials were compared by.
        table: one row a trial: the searched values, the metric, reports made, state.
        mlflow_run_id: the parent run, "" if tracking is off.
    """

    best_config: str
    best_trial: int
    best_value: float
    metric: str
    table: pd.DataFrame
    mlflow_run_id: str = ""

    def lines(self) -> list[str]:
        """What the command line prints."""
        return [
            self.table.to_string(index=False),
            f"best: trial {self.best_trial}, {self.metric} = {self.best_value:.5g}",
            f"next: cellray finetune {self.best_config}",
        ]


def trial_run(run: TuneRun, trial: int, base: dict[str, Any] | None = None) -> FinetuneRun:
    """The fine-tuning run of one trial, validated.

    Args:
        run: the sweep.
        trial: its number.
        base: what ``run.base`` holds, if it has been read already (trials may not see the file).

    Raises:
        ConfigError: a searched key that the schema does not know, or a value it refuses.
    """
    from cellray.runs import FinetuneRun, build_run

    raw = apply_overrides(read_toml(run.base) if base is None else base, run.overrides)
    point = sample(parse_space(run.search), trial, seed=run.seed)
    raw = apply_overrides(raw, [f"{key}={json.dumps(value)}" for key, value in point.items()])
    raw["name"] = f"trial{trial:03d}"
    train = raw.setdefault("train", {})
    if not train.get("eval_every_steps"):
        raise ConfigError(
            f"'{run.base}': a sweep compares trials at train.eval_every_steps; set it above 0"
        )
    train["log_every_steps"] = train["eval_every_steps"]  # every report carries the metric
    raw["checkpoint"] = {
        **raw.get("checkpoint", {}),
        "dir": str(RunDirectory(run.checkpoint.dir, run.name).path / "trials"),
        "background": False,  # a checkpoint written beside training is reported apart from metrics
    }
    raw["tracking"] = to_dict(run.tracking) | {
        "mlflow_uri": tracking_uri(run.tracking, run.checkpoint.dir),
        "experiment": run.tracking.experiment or "tune",
    }
    built = build_run("finetune", raw, source=f"{run.base} with search of {run.name}")
    assert isinstance(built, FinetuneRun)
    return built


def check_sweep(run: TuneRun) -> list[str]:
    """Validate every trial and its data; returns lines for ``--check``."""
    lines = []
    for trial in range(run.trials):
        point = sample(parse_space(run.search), trial, seed=run.seed)
        trial_run(run, trial)
        lines.append(f"trial {trial}: {point}")
    job = prepare_finetune(trial_run(run, 0)).job
    return [*lines, f"steps: {job.steps} a trial at most, ASHA stops the worse earlier"]


class _Tell(ray_tune.Callback):  # type: ignore[misc]
    """Says what each trial reports, in the sweep's own words."""

    def __init__(self, say: Say, metric: str, total: int) -> None:
        self._say, self._metric, self._total = say, metric, total
        self._done: set[str] = set()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        value = result.get(self._metric, math.nan)
        number = result["config"]["trial"]
        self._say(
            f"trial {number} report {result['training_iteration']}  {self._metric} {value:.4f}  "
            f"{len(self._done)}/{self._total} trials done"
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._done.add(trial.trial_id)


def _space(run: TuneRun) -> dict[str, Any]:
    return {"trial": ray_tune.grid_search(list(range(run.trials)))}


def _trainable(raw: dict[str, Any], parent: str) -> Callable[[dict[str, Any]], None]:
    base, here = read_toml(raw["base"]), os.getcwd()

    def run_trial(config: dict[str, Any]) -> None:
        from cellray.runs import TuneRun, build_run

        if os.path.isdir(here):
            os.chdir(here)  # Tune starts a trial in a folder of its own; paths are the driver's
        run = build_run("tune", raw)
        assert isinstance(run, TuneRun)
        finetune(
            trial_run(run, config["trial"], base),
            lambda line: None,
            parent=parent or None,
            extra_callbacks=[TuneReportCallback()],
            look_at_test=False,
        )

    return run_trial


def _close_children(run: TuneRun) -> None:
    """End the MLflow runs of trials that the scheduler stopped: their process was killed."""
    for file in sorted(
        RunDirectory(run.checkpoint.dir, run.name).path.glob("trials/*/mlflow.json")
    ):
        facts = json.loads(file.read_text())
        if not (file.parent / "result.json").is_file():
            tracker = Tracker(facts["uri"], facts["run_id"])
            tracker.tag("cellray.stopped_by", "scheduler")
            tracker.end("KILLED")


def _row(run: TuneRun, result: Any) -> dict[str, Any]:
    trial = (result.config or {}).get("trial", -1)
    frame = result.metrics_dataframe
    values = frame[run.metric].dropna() if frame is not None and run.metric in frame else []
    best = (min if run.mode == "min" else max)(values, default=math.nan)
    state = "failed" if result.error else "finished"
    if not result.error and trial >= 0:
        folder = RunDirectory(run.checkpoint.dir, run.name).path / "trials" / f"trial{trial:03d}"
        state = "finished" if (folder / "result.json").is_file() else "stopped early"
    point = sample(parse_space(run.search), trial, seed=run.seed) if trial >= 0 else {}
    return {
        "trial": trial,
        **point,
        run.metric: float(best),
        "reports": len(values),
        "state": state,
    }


def _write_best(run: TuneRun, trial: int) -> Path:
    """The best trial's configuration as a file of its own, with paths and names of a plain run."""
    raw = {k: v for k, v in to_dict(trial_run(run, trial)).items() if v is not None}
    raw["name"] = f"{run.name}-best"
    raw["checkpoint"]["dir"] = run.checkpoint.dir
    raw["tracking"] = to_dict(run.tracking)
    path = RunDirectory(run.checkpoint.dir, run.name).path / "best.toml"
    path.write_text(f"# Best of {run.trials} trials of the sweep '{run.name}'.\n{to_toml(raw)}\n")
    return path


def tune(run: TuneRun, say: Say) -> TuneResult:
    """Run a sweep.

    Raises:
        CellrayError: any trial's configuration does not fit; found before the first starts.
        DataError: every trial failed.
    """
    uri = tracking_uri(run.tracking, run.checkpoint.dir)
    if run.tracking.enabled:
        check_tracking(uri)
    check_sweep(run)
    directory = RunDirectory(run.checkpoint.dir, run.name)
    directory.enter(to_dict(run), {}, "never" if directory.path.exists() else "auto")
    first = trial_run(run, 0)
    ensure_ray(first.scale, extra_cpus=run.concurrent * _TRIAL_CPUS, times=run.concurrent)
    tracker = None
    if run.tracking.enabled:
        experiment = run.tracking.experiment or "tune"
        tracker = Tracker.start(uri, experiment=experiment, name=run.name)
        tracker.params(flatten(to_dict(run)))
    reports = max(2, math.ceil(prepare_finetune(first).job.steps / first.train.eval_every_steps))
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(
            _trainable(to_dict(run), tracker.run_id if tracker else ""), {"CPU": _TRIAL_CPUS}
        ),
        param_space=_space(run),
        tune_config=ray_tune.TuneConfig(
            metric=run.metric,
            mode=run.mode,
            max_concurrent_trials=run.concurrent,
            time_budget_s=run.time_limit_s or None,
            scheduler=ASHAScheduler(
                time_attr="training_iteration",
                max_t=reports + 1,  # the whole run is the longest a trial may take
                grace_period=min(run.grace_reports, reports),
                reduction_factor=run.reduction_factor,
            ),
        ),
        run_config=ray_tune.RunConfig(
            name="tune",
            storage_path=str(directory.path),
            callbacks=[_Tell(say, run.metric, run.trials)],
            verbose=0,
        ),
    )
    status = "FAILED"
    try:
        with kept_interrupt():
            grid = tuner.fit()
        result = _result(run, grid, tracker)
        status = "FINISHED"
    finally:
        if tracker is not None:
            _close_children(run)
            tracker.end(status)
    return result


def _result(run: TuneRun, grid: Any, tracker: Tracker | None) -> TuneResult:
    table = pd.DataFrame([_row(run, result) for result in grid]).sort_values("trial")
    scored = table.dropna(subset=[run.metric])
    if scored.empty:
        errors = "; ".join(str(e).strip().splitlines()[-1] for e in grid.errors[:3])
        raise DataError(f"no trial of '{run.name}' reported {run.metric}: {errors}")
    order = scored[run.metric]
    best = scored.loc[order.idxmin() if run.mode == "min" else order.idxmax()]
    path = _write_best(run, int(best["trial"]))
    if tracker is not None:
        tracker.table(table, "tables/trials.json")
        tracker.metrics({f"best.{run.metric}": float(best[run.metric])})
        tracker.artifact(path)
    return TuneResult(
        str(path),
        int(best["trial"]),
        float(best[run.metric]),
        run.metric,
        table,
        tracker.run_id if tracker else "",
    )
