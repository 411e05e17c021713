"""Ray Tune sweeps of whole fine-tuning runs, with one MLflow parent and a child per trial."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import ray
from ray import tune as ray_tune

from cellray.core import registry
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import flatten, to_dict, to_toml
from cellray.train.config import ScaleSection
from cellray.train.finetune import prepare_finetune
from cellray.train.rundir import RunDirectory
from cellray.train.tracking import Tracker, check_tracking, tracking_uri
from cellray.train.trainer import cpus_needed, ensure_ray, kept_interrupt
from cellray.tune.board import Board, Watch, until
from cellray.tune.inside import trainable
from cellray.tune.ledger import ENDED, FAILED, Ledger, trial_name
from cellray.tune.picture import draw_sweep
from cellray.tune.propose import fixed_points, number_of_trials
from cellray.tune.schedule import Proposals, scheduler_of
from cellray.tune.space import Space
from cellray.tune.table import TuneResult, best_trial, trial_table, write_tables
from cellray.tune.trial import check_space, ledger_of, most, read_base, trial_run, write_best

if TYPE_CHECKING:
    from cellray.runs import TuneRun

__all__ = ["TuneResult", "check_sweep", "tune"]

Say = Callable[[str], None]
# Keys of a sweep that may change when it goes on.
_FREE = ("trials", "concurrent", "trial_cpus", "time_limit_s", "checkpoint", "tracking", "base",
         "overrides")  # fmt: skip
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # metrics.jsonl and MLflow have it all
    "RAY_AIR_NEW_OUTPUT": "0",  # its banner; our own lines speak for the sweep
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours stops in order, and keeps what is needed
}


@dataclass(frozen=True)
class _Checked:
    """A sweep that fits its schema, nothing started yet.

    Attributes:
        base: the fine-tuning file with the sweep's overrides.
        space: the searched keys.
        points: of all trials; None for Optuna's.
        total: number of trials.
        every: steps between two reports of a trial.
        scale: the largest that a trial may reserve.
    """

    base: dict[str, Any]
    space: Space
    points: list[dict[str, Any]] | None
    total: int
    every: int
    scale: ScaleSection


def _check(run: TuneRun) -> _Checked:
    base = read_base(run)
    space = check_space(run, base)
    points, total = fixed_points(run), number_of_trials(run)
    if run.scheduler == "pbt" and (run.concurrent < total or total < 2):
        raise ConfigError(
            f"scheduler = 'pbt' trains its population at a time: trials = {total} needs "
            f"concurrent = {max(total, 2)} and at least two trials (given: concurrent = "
            f"{run.concurrent})"
        )
    root = ledger_of(run).root
    for trial, point in enumerate(points or []):
        trial_run(run, base, point, root / trial_name(trial))
    point = points[0] if points else {key: axis.ends()[0] for key, axis in space.items()}
    first = trial_run(run, base, point, root / trial_name(0))
    scale = most(space, first).scale
    return _Checked(base, space, points, total, first.train.eval_every_steps, scale)


def check_sweep(run: TuneRun) -> list[str]:
    """Validate every trial and its data; returns lines for ``--check``.

    Raises:
        CellrayError: a key or value that does not fit the schema or the data.
    """
    checked = _check(run)
    steps, _ = _look_at_data(run, checked)
    named = [f"trial {n}: {point}" for n, point in enumerate(checked.points or [])]
    if not named:
        named = [f"{checked.total} trials, proposed by Optuna from the trials before"]
    how = {
        "asha": "ASHA stops the worse earlier",
        "pbt": "the worse take over the weights of the better",
        "none": "none is stopped early",
    }[run.scheduler]
    return [
        *named,
        f"steps: {steps} a trial at most, {how}",
        f"reserved: {_reserved(run, checked)[2]}",
    ]


def _look_at_data(run: TuneRun, checked: _Checked) -> tuple[int, str]:
    """Steps of a trial, and the moment at which all trials read the store.

    Raises:
        CellrayError: the data do not fit; there are no validation cells to compare trials on.
    """
    point = (checked.points or [{k: axis.ends()[0] for k, axis in checked.space.items()}])[0]
    job = prepare_finetune(
        trial_run(run, checked.base, point, ledger_of(run).root / trial_name(0))
    ).job
    if not len(job.data.validation):
        raise ConfigError(
            f"'{run.base}' sets no validation cells apart, and a sweep compares trials on them; "
            "set task.split.validation_fraction above 0"
        )
    _check_metric(run, job.manifest.objective["name"])
    return job.steps, job.data.timestamp


def _check_metric(run: TuneRun, objective: str) -> None:
    """See that validation reports what trials are to be compared by.

    Raises:
        ConfigError: it does not.
    """
    known = registry.find("cellray.objectives", objective, "OBJECTIVE").metrics
    names = [f"validation/{name}" for name in ("loss", *known)]
    if known and run.metric not in names:
        raise ConfigError(
            f"metric = '{run.metric}' is not among what validation reports: {', '.join(names)}"
        )


def _reserved(run: TuneRun, checked: _Checked) -> tuple[float, float, str]:
    """CPUs and GPUs of all trials that run at a time, and the same in words."""
    scale, times = checked.scale, min(run.concurrent, checked.total)
    fewest = scale.min_workers or scale.workers  # an elastic run begins with what there is
    one = cpus_needed(scale.model_copy(update={"workers": fewest})) + run.trial_cpus
    gpus = fewest * scale.gpus_per_worker
    words = (
        f"{times * one:g} CPUs and {times * gpus:g} GPUs: {times} trials at a time, each "
        f"{one - run.trial_cpus:g} CPUs and {gpus:g} GPUs for its training run and "
        f"{run.trial_cpus:g} CPUs of its own"
    )
    return times * one, times * gpus, words


def _check_fits(run: TuneRun, checked: _Checked) -> None:
    """See that the trials that run at a time fit the cluster, side by side.

    Raises:
        ConfigError: they do not; they would wait for each other for ever.
    """
    cpus, gpus, words = _reserved(run, checked)
    ensure_ray(extra_cpus=max(cpus - 1, 0))
    have = ray.cluster_resources()
    if have.get("CPU", 0) < cpus or have.get("GPU", 0) < gpus:
        raise ConfigError(
            f"the sweep reserves {words}; the Ray cluster has {have.get('CPU', 0):g} CPUs and "
            f"{have.get('GPU', 0):g} GPUs. Lower concurrent, scale.workers, scale.cpus_per_worker "
            "or scale.cpus_per_actor, or add nodes"
        )


def _enter(run: TuneRun, checked: _Checked, directory: RunDirectory) -> None:
    """Begin or go on with the sweep of this name.

    Raises:
        ConfigError: another sweep was begun under this name.
    """
    plain = {k: v for k, v in to_dict(run).items() if k not in _FREE}
    if run.algorithm == "grid":
        plain["trials"] = checked.total
    directory.enter({"sweep": plain, "base": checked.base}, {}, run.checkpoint.resume)
    (directory.path / "config.toml").write_text(to_toml(to_dict(run)) + "\n")


def _pinned(run: TuneRun, checked: _Checked, directory: RunDirectory) -> str:
    """The moment at which every trial reads the store: the one of the sweep's first start."""
    known = directory.read("snapshot.json").get("timestamp")
    if known is None:
        _, known = _look_at_data(run, checked)
        directory.write("snapshot.json", {"timestamp": known})
    return str(known)


def _parent(run: TuneRun, uri: str, directory: RunDirectory) -> Tracker | None:
    """The sweep's MLflow run: the one it began with, else a new one."""
    if not run.tracking.enabled:
        return None
    old = directory.read("mlflow.json")
    if old.get("uri") == uri:
        tracker = Tracker(uri, old["run_id"])
        tracker.restart()
        return tracker
    tracker = Tracker.start(uri, experiment=run.tracking.experiment or "tune", name=run.name)
    tracker.params(flatten(to_dict(run)))
    directory.write("mlflow.json", {"uri": uri, "run_id": tracker.run_id})
    return tracker


def _pending(checked: _Checked, ledger: Ledger) -> list[int]:
    """Trials that have not ended, those that have begun first; failed ones are tried again."""
    open_ = [n for n in range(checked.total) if ledger.state(n) not in ENDED]
    return sorted(open_, key=lambda n: (not ledger.read(n), n))


@contextmanager
def _environment() -> Iterator[None]:
    """Settings that Ray Tune reads from the environment, put back afterwards."""
    before = {key: os.environ.get(key) for key in _QUIET}
    os.environ.update({k: v for k, v in _QUIET.items() if before[k] is None})
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors of trials are told in a line each; Ray Tune's traces of them are for the verbose."""
    log = logging.getLogger("ray.tune")
    before = log.level
    if os.environ.get("CELLRAY_VERBOSE") != "1":
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _tuner(board: Board, checked: _Checked, pending: list[int], timestamp: str, stop: Any) -> Any:
    run, ledger = board.run, board.ledger
    space: dict[str, Any] = {}
    search = None
    if checked.points is None:
        search = Proposals(run, checked.space, ledger, pending, checked.every)
    else:
        known = {n: ledger.point(n) or checked.points[n] for n in pending}
        space = {"point": ray_tune.grid_search([{"trial": n, **p} for n, p in known.items()])}
    folder = ledger.root.parent / "tune"  # Ray Tune's own notes: nothing is read back from them
    shutil.rmtree(folder, ignore_errors=True)
    parent = board.tracker.run_id if board.tracker else ""
    inside = trainable(to_dict(run), checked.base, parent, timestamp)
    return ray_tune.Tuner(
        ray_tune.with_resources(inside, {"CPU": run.trial_cpus}),
        param_space=space,
        tune_config=ray_tune.TuneConfig(
            metric=run.metric,
            mode=run.mode,
            num_samples=len(pending) if search else 1,
            search_alg=search,
            max_concurrent_trials=run.concurrent,
            scheduler=scheduler_of(run, checked.space, ledger, checked.every),
            trial_name_creator=_named,
            trial_dirname_creator=_named,
        ),
        run_config=ray_tune.RunConfig(
            name="tune",
            storage_path=str(folder.parent),
            callbacks=[Watch(board)],
            stop=stop,
            verbose=0,
        ),
    )


def _named(trial: Any) -> str:
    return trial_name(int(trial.config["point"]["trial"]))


def _fit(board: Board, checked: _Checked, pending: list[int], timestamp: str) -> None:
    """Run the trials that have not ended, until they have, or the sweep is to stop."""
    with (
        _environment(),
        _quiet(),
        kept_interrupt(),
        until(board) as stop,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Consider boosting PBT performance")
        _tuner(board, checked, pending, timestamp, stop).fit()


def tune(run: TuneRun, say: Say) -> TuneResult:
    """Run a sweep; goes on with an unfinished one of the same name and configuration.

    Finished trials and those stopped early are never trained again; others go on from their last
    checkpoint.

    Raises:
        CellrayError: a trial's configuration does not fit, or the trials that run at a time do not
            fit the cluster; found before the first starts.
        DataError: no trial has reported the metric.
        KeyboardInterrupt: Ctrl-C; what there is has been written.
    """
    uri = tracking_uri(run.tracking, run.checkpoint.dir)
    if run.tracking.enabled:
        check_tracking(uri)
    checked = _check(run)
    directory, ledger = RunDirectory(run.checkpoint.dir, run.name), ledger_of(run)
    with directory.held():
        _enter(run, checked, directory)
        pending = _pending(checked, ledger)
        if not pending and directory.read("done.json").get("trials") == checked.total:
            say(f"{run.name}: all {checked.total} trials have ended; nothing to do")
            return _gather(run, checked, None, directory)
        timestamp = _pinned(run, checked, directory)
        if pending:
            _check_fits(run, checked)
        tracker = _parent(run, uri, directory)
        board = Board(run, ledger, checked.every, checked.total, tracker, uri, say)
        if len(pending) < checked.total:
            say(f"{run.name}: goes on; {board.standing()}")
        status = "FAILED"
        try:
            if pending:
                _fit(board, checked, pending, timestamp)
            status = "KILLED" if board.interrupted else status
            result = _gather(run, checked, tracker, directory)
            status = "KILLED" if board.interrupted else "FINISHED"
        except DataError:  # an interrupted sweep need not have found anything
            if not board.interrupted:
                raise
        except KeyboardInterrupt:
            board.interrupted, status = True, "KILLED"
            raise
        finally:
            for trial in ledger.known():
                board.close_child(trial)
            if tracker is not None:
                tracker.end(status)
            if board.interrupted:
                say(f"{run.name}: {board.standing()}; the same command goes on from here")
        if board.interrupted:
            raise KeyboardInterrupt
        return result


def _gather(
    run: TuneRun, checked: _Checked, tracker: Tracker | None, directory: RunDirectory
) -> TuneResult:
    """Write what the trials have found: tables, the best configuration, the picture.

    Raises:
        DataError: no trial has reported the metric.
    """
    ledger = ledger_of(run)
    table = trial_table(run, checked.space, ledger, checked.every)
    best = best_trial(table, run.metric, run.mode)
    files = write_tables(run, table, best, ledger, checked.every)
    if best is None:
        errors = "; ".join(sorted({str(e) for e in table["error"] if e})[:3])
        why = errors or "they were stopped before their first validation"
        raise DataError(f"no trial of '{run.name}' reported {run.metric}: {why}")
    value = float(table.set_index("trial").loc[best, run.metric])
    told = f"Trial {best} of the sweep '{run.name}': {run.metric} = {value:.5g}."
    path = write_best(run, checked.base, best, told)
    picture = draw_sweep(
        table,
        log=[key for key, axis in checked.space.items() if axis.log],
        keys=list(checked.space),
        metric=run.metric,
        mode=run.mode,
        best=best,
        path=directory.path / "sweep.png",
        title=run.name,
    )
    complete = len(table) == checked.total and all(table["state"].isin([*ENDED, FAILED]))
    if tracker is not None:
        _track(tracker, directory, table, [*files, path, picture])
        tracker.metrics({f"best.{run.metric}": value, "trials": float(len(table))})
        tracker.tag("cellray.best_trial", str(best))
    if complete:
        directory.write("done.json", {"trials": checked.total})
    run_id = str(directory.read("mlflow.json").get("run_id", "")) if run.tracking.enabled else ""
    return TuneResult(str(path), best, value, run.metric, table, str(picture), complete, run_id)


def _track(
    tracker: Tracker, directory: RunDirectory, table: pd.DataFrame, files: list[Path]
) -> None:
    """Log the files and the table; a table that was logged before is replaced."""
    for file in files:
        tracker.artifact(file)
    shown: Mapping[str, Any] = json.loads(table.to_json(orient="split", index=False))
    plain = pd.DataFrame(shown["data"], columns=shown["columns"])
    if not directory.read("tracked.json"):
        tracker.table(plain, "tables/trials.json")
        directory.write("tracked.json", {"table": "tables/trials.json"})
        return
    folder = directory.path / "tables"
    folder.mkdir(exist_ok=True)
    (folder / "trials.json").write_text(json.dumps(shown))
    tracker.artifact(folder / "trials.json", "tables")
