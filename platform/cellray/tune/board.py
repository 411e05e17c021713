"""Follows the trials of a running sweep: progress lines, notes, MLflow children, when to stop."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import cloudpickle
from ray import tune as ray_tune

from cellray.core.errors import CellrayError
from cellray.train.rundir import RunDirectory
from cellray.train.tracking import Tracker
from cellray.tune.inside import trial_number
from cellray.tune.ledger import ENDED, FAILED, FINISHED, STOPPED, Ledger, trial_name

if TYPE_CHECKING:
    from cellray.runs import TuneRun

__all__ = ["Board", "Watch", "until"]

Say = Callable[[str], None]
_STATUS = {FINISHED: "FINISHED", FAILED: "FAILED"}  # of an MLflow run; else KILLED


@dataclass
class Board:
    """What the driver knows of a running sweep.

    Attributes:
        run: the sweep.
        ledger: of its trials.
        every: steps between two reports of a trial.
        total: trials of the sweep.
        tracker: the MLflow parent; None without tracking.
        uri: MLflow tracking store.
        say: receives progress lines.
        interrupted: Ctrl-C was pressed.
        out_of_time: the time limit has passed.
    """

    run: TuneRun
    ledger: Ledger
    every: int
    total: int
    tracker: Tracker | None
    uri: str
    say: Say
    interrupted: bool = False
    out_of_time: bool = False
    _began: float = field(default_factory=time.monotonic)
    _since: dict[int, tuple[float, float]] = field(default_factory=dict)
    _values: dict[int, float] = field(default_factory=dict)
    _parts: dict[int, float] = field(default_factory=dict)
    _done_before: float = 0.0

    def __post_init__(self) -> None:
        for trial in self.ledger.known():
            value = self._value(trial)
            if not math.isnan(value):
                self._values[trial] = value
            steps = self.ledger.steps(trial)
            rows = self.ledger.reports(trial, self.every)
            self._parts[trial] = rows[-1].step / steps if rows and steps else 0.0
            if self.ledger.state(trial) in ENDED:
                self._parts[trial] = 1.0
        self._done_before = sum(self._parts.values())

    def _value(self, trial: int) -> float:
        run = self.run
        last = run.scheduler == "pbt"
        return self.ledger.value(trial, run.metric, run.mode, every=self.every, last=last)

    def stop(self) -> bool:
        """Whether the sweep is to end now."""
        limit = self.run.time_limit_s
        if limit and time.monotonic() - self._began > limit and not self.out_of_time:
            self.out_of_time = True
            self.say(f"time limit of {limit:g} s reached; trials that run are stopped")
        return self.out_of_time or self.interrupted

    def standing(self) -> str:
        """Trials done, the best so far, and when all will be."""
        states = [self.ledger.state(trial) for trial in self.ledger.known()]
        ended = sum(state in (*ENDED, FAILED) for state in states)
        told = [f"{ended} of {self.total} trials done"]
        if self._values:
            choose = min if self.run.mode == "min" else max
            best = choose(self._values, key=lambda trial: self._values[trial])
            told.append(f"best {self._values[best]:.4g} (trial {best})")
        done = sum(self._parts.values())
        gained = done - self._done_before
        if gained > 0:
            left = (self.total - done) / gained * (time.monotonic() - self._began)
            told.append(f"ETA {left:.0f} s")
        return "  ".join(told)

    def started(self, trial: int, point: dict[str, Any]) -> None:
        """A trial starts, or goes on."""
        spent = float(self.ledger.read(trial).get("seconds", 0.0))
        if trial not in self._since:
            self._since[trial] = (time.monotonic(), spent)
            values = ", ".join(f"{k} = {_short(v)}" for k, v in point.items())
            goes = "goes on" if self._parts.get(trial) else "starts"
            self.say(f"trial {trial} {goes}: {values}")
        facts: dict[str, Any] = {"state": "running", "error": ""}
        if not self.ledger.read(trial).get("point"):
            facts |= {"point": point}
        self.ledger.note(trial, **facts)
        self._child(trial, point)

    def reported(self, trial: int, result: dict[str, Any]) -> None:
        """A trial has reported."""
        value = float(result.get(self.run.metric, math.nan))
        self._spend(trial)
        self._parts[trial] = min(float(result["step"]) / max(float(result["steps"]), 1.0), 1.0)
        if not math.isnan(value):
            better = min if self.run.mode == "min" else max
            before = value if self.run.scheduler == "pbt" else self._values.get(trial, value)
            self._values[trial] = better(before, value)
        stopped = self.ledger.state(trial) == STOPPED
        if stopped:
            self._parts[trial] = 1.0
        reports = math.ceil(result["steps"] / self.every)
        self.say(
            f"trial {trial} report {result['report']}/{reports}  {self.run.metric} {value:.4f}"
            f"{'  stopped early' if stopped else ''}  {self.standing()}"
        )

    def took_over(self, trial: int, point: dict[str, Any]) -> None:
        """A trial goes on from another's weights."""
        change = self.ledger.changes(trial)[-1]
        values = ", ".join(f"{k} = {_short(v)}" for k, v in point.items())
        self.say(
            f"trial {trial} takes over the weights of trial {change['from']} at step "
            f"{change['step']}: {values}"
        )
        tracker = self._tracker(trial)
        if tracker is not None:
            numbers = {f"search/{k}": v for k, v in point.items() if isinstance(v, int | float)}
            tracker.metrics(numbers, step=int(change["step"]))
            tracker.tag(f"cellray.took_over.{change['step']}", f"trial {change['from']}: {values}")

    def ended(self, trial: int, error: str = "") -> None:
        """A trial has ended, by itself or not."""
        self._spend(trial)
        self._since.pop(trial, None)
        if error:
            self.ledger.note(trial, state=FAILED, error=error)
            self._values.pop(trial, None)
            self.say(f"trial {trial} failed: {error}  {self.standing()}")
        state = self.ledger.state(trial)
        if state in (*ENDED, FAILED):
            self._parts[trial] = 1.0
        if state == FINISHED:
            self.say(f"trial {trial} finished  {self.standing()}")
        self.close_child(trial)

    def _spend(self, trial: int) -> None:
        if trial in self._since:
            began, before = self._since[trial]
            self.ledger.note(trial, seconds=before + time.monotonic() - began)

    def _tracker(self, trial: int) -> Tracker | None:
        folder = self.ledger.folder(trial)
        facts = RunDirectory(str(folder.parent), folder.name).read("mlflow.json")
        if self.tracker is None or facts.get("uri") != self.uri:
            return None
        return Tracker(self.uri, facts["run_id"])

    def _child(self, trial: int, point: dict[str, Any]) -> None:
        """The trial's MLflow run, made by the driver: a trial that cannot even begin has one."""
        if self.tracker is None or self._tracker(trial) is not None:
            return
        child = Tracker.start(
            self.uri,
            experiment=self.run.tracking.experiment or "tune",
            name=f"{self.run.name}-{trial_name(trial)}",
            parent=self.tracker.run_id,
            tags={"cellray.trial": str(trial)},
        )
        child.params(point)
        folder = self.ledger.folder(trial)
        folder.mkdir(parents=True, exist_ok=True)
        where = {"uri": self.uri, "run_id": child.run_id}
        RunDirectory(str(folder.parent), folder.name).write("mlflow.json", where)

    def close_child(self, trial: int) -> None:
        """End the trial's MLflow run: the process that wrote it may have been killed."""
        tracker = self._tracker(trial)
        if tracker is None:
            return
        state = self.ledger.state(trial)
        tracker.tag("cellray.state", state)
        if state == FAILED:
            tracker.tag("cellray.error", str(self.ledger.read(trial).get("error", "")))
        tracker.end(_STATUS.get(state, "KILLED"))


class Watch(ray_tune.Callback):  # type: ignore[misc]
    """Tells a board what Ray Tune does."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._changes = {n: len(board.ledger.changes(n)) for n in board.ledger.known()}

    def __reduce__(self) -> Any:
        return ray_tune.Callback, ()  # Ray Tune keeps a copy of its settings, which nobody reads

    def on_trial_start(self, iteration: int, trials: Sequence[Any], trial: Any, **_: Any) -> None:
        """See :meth:`Board.started`."""
        number, point = _of(trial)
        self._board.started(number, point)

    def on_trial_result(
        self,
        iteration: int,
        trials: Sequence[Any],
        trial: Any,
        result: dict[str, Any],
        **_: Any,
    ) -> None:
        """See :meth:`Board.reported`."""
        number, point = _of(trial)
        board = self._board
        changes = len(board.ledger.changes(number))
        if changes > self._changes.get(number, 0):
            board.took_over(number, point)
        self._changes[number] = changes
        board.reported(number, result)

    def on_trial_complete(
        self, iteration: int, trials: Sequence[Any], trial: Any, **_: Any
    ) -> None:
        """See :meth:`Board.ended`."""
        self._board.ended(_of(trial)[0])

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **_: Any) -> None:
        """See :meth:`Board.ended`."""
        self._board.ended(_of(trial)[0], _error(trial))


def _error(trial: Any) -> str:
    """What a trial died of, in one line; its file is here before it is in Ray Tune's storage."""
    file = Path(trial.pickled_error_file or "")
    error = cloudpickle.loads(file.read_bytes()) if file.is_file() else None
    cause = getattr(error, "cause", None)
    if isinstance(cause, CellrayError):
        return " ".join(str(cause).split())
    lines = [line.strip() for line in str(error or "").strip().splitlines() if line.strip()]
    return lines[-1] if lines else "the trial's process died"


class _Stop(ray_tune.Stopper):  # type: ignore[misc]
    def __init__(self, board: Board) -> None:
        self._board = board

    def __reduce__(self) -> Any:
        return ray_tune.stopper.NoopStopper, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._board.stop()


def _of(trial: Any) -> tuple[int, dict[str, Any]]:
    """A Ray Tune trial's number and values."""
    point = {k: v for k, v in trial.config["point"].items() if k != "trial"}
    return trial_number(trial.custom_trial_name), point


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def until(board: Board) -> Iterator[_Stop]:
    """What ends a sweep before its time: the time limit, and Ctrl-C, the first one in order.

    A second Ctrl-C interrupts at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield _Stop(board)  # only the main thread may set handlers
        return
    before = signal.getsignal(signal.SIGINT)

    def interrupt(number: int, frame: Any) -> None:
        board.interrupted = True
        board.say("interrupted; trials that run are stopped, a second Ctrl-C does not wait")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield _Stop(board)
    finally:
        signal.signal(signal.SIGINT, before)
