"""What runs inside a trial's actor: a whole fine-tuning run on Ray Train, reported to Ray Tune."""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune as ray_tune

from cellray.core.errors import CheckpointError, ConfigError
from cellray.train.checkpoint import read_manifest
from cellray.train.finetune import finetune, prepare_finetune
from cellray.train.rundir import RunDirectory
from cellray.train.saving import committed, newest_whole
from cellray.tune.ledger import Ledger, Report
from cellray.tune.trial import ledger_of, trial_run

if TYPE_CHECKING:
    from cellray.runs import FinetuneRun, TuneRun

__all__ = ["START", "trainable", "trial_number"]

START = "start.json"  # in a Ray Tune checkpoint: whose weights to go on from, and where they lie
_POLL_S = 0.5
_WAIT_S = 120.0  # for the workers of a killed start to be gone


def trial_number(name: str) -> int:
    """The number in a trial's name; its configuration may have been another trial's before."""
    return int(name.removeprefix("trial"))


def _await_lock(folder: Path) -> None:
    """Wait until no process of an earlier start trains in the folder."""
    until = time.monotonic() + _WAIT_S
    while True:
        try:
            with RunDirectory(str(folder.parent), folder.name).held():
                return
        except CheckpointError:
            if time.monotonic() > until:
                raise
            time.sleep(_POLL_S)


def _begin(ledger: Ledger, trial: int, point: dict[str, Any], start: Mapping[str, Any]) -> None:
    """Take over another trial's weights, if that is what Ray Tune starts the trial with."""
    _await_lock(ledger.folder(trial))
    if start and start["trial"] != trial:
        ledger.take_over(trial, start["trial"], start["name"], point)
        return
    folder = ledger.folder(trial)
    if folder.is_dir():  # what was noted after the last checkpoint is trained again
        whole, _ = newest_whole(folder)
        step = read_manifest(whole).step if whole is not None else 0
        RunDirectory(str(folder.parent), folder.name).rewind(step)


def _handed_over() -> dict[str, Any]:
    checkpoint = ray_tune.get_checkpoint()
    if checkpoint is None:
        return {}
    with checkpoint.as_directory() as folder:
        start: dict[str, Any] = json.loads((Path(folder) / START).read_text())
    return start


class _Reporter:
    """Reports the validations of a run directory to Ray Tune, each once."""

    def __init__(self, run: TuneRun, trial: int, steps: int, every: int) -> None:
        self._run, self._trial = run, trial
        self._steps, self._every = steps, every
        self._ledger = ledger_of(run)
        self._last = -1
        self.made = 0

    def skip_known(self) -> None:
        """What was reported before this start, and will not be trained again, is known."""
        notes = committed(self._ledger.folder(self._trial))
        self._last = max((int(note["step"]) for note in notes), default=-1)

    def _due(self) -> list[Report]:
        rows = self._ledger.reports(self._trial, self._every)
        fresh = [row for row in rows if row.step > self._last]
        if self._run.scheduler == "pbt":  # what others may go on from must be written
            notes = committed(self._ledger.folder(self._trial))
            saved = {int(note["step"]) for note in notes}
            fresh = [row for row in fresh if row.step in saved]
        return fresh

    def look(self) -> None:
        """Report what is new."""
        for row in self._due():
            self._report(row)

    def last_again(self) -> None:
        """Report the last validation if this start made none: Ray Tune wants to hear of a trial."""
        rows = self._ledger.reports(self._trial, self._every)
        if not self.made and rows:
            self._report(rows[-1])

    def _report(self, row: Report) -> None:
        metric = self._run.metric
        if metric not in row.metrics:
            known = sorted(name for name in row.metrics if name.startswith("validation/"))
            raise ConfigError(
                f"metric = '{metric}' is not among what validation reports: {', '.join(known)}"
            )
        self._last, self.made = row.step, self.made + 1
        told = {
            metric: row.metrics[metric],
            "step": row.step,
            "steps": self._steps,
            "report": math.ceil(row.step / self._every),
            "last": row.step >= self._steps,
        }
        notes = committed(self._ledger.folder(self._trial))
        saved = [str(note["name"]) for note in notes if int(note["step"]) == row.step]
        if self._run.scheduler != "pbt" or not saved:
            ray_tune.report(told)
            return
        name = saved[-1]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / START).write_text(json.dumps({"trial": self._trial, "name": name}))
            ray_tune.report(told, checkpoint=ray_tune.Checkpoint.from_directory(folder))


def _train(built: FinetuneRun, parent: str, reporter_of: Callable[[int], _Reporter]) -> None:
    """Fine-tune in a thread, and report beside it."""
    prepared = prepare_finetune(built)
    reporter = reporter_of(prepared.job.steps)
    reporter.skip_known()
    trouble: list[BaseException] = []

    def train() -> None:
        try:
            finetune(
                built,
                lambda line: None,
                parent=parent or None,
                prepared=prepared,
                look_at_test=False,
            )
        except BaseException as error:  # noqa: BLE001  raised again below
            trouble.append(error)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    while thread.is_alive():
        reporter.look()
        thread.join(_POLL_S)
    if trouble:
        raise trouble[0]
    reporter.look()
    reporter.last_again()


def trainable(
    raw: dict[str, Any], base: dict[str, Any], parent: str, timestamp: str
) -> Callable[[dict[str, Any]], None]:
    """The function that Ray Tune calls for each trial.

    Args:
        raw: the sweep's configuration.
        base: of its fine-tuning file; trials may not see the file.
        parent: MLflow run that the trials' runs are children of, "" without tracking.
        timestamp: read the store as it was then.
    """
    here = os.getcwd()

    def run_trial(config: dict[str, Any]) -> None:
        from cellray.runs import TuneRun, build_run

        if os.path.isdir(here):
            os.chdir(here)  # Tune starts a trial in a folder of its own; paths are the driver's
        run = build_run("tune", raw)
        assert isinstance(run, TuneRun)
        trial = trial_number(ray_tune.get_context().get_trial_name())
        point = {key: value for key, value in config["point"].items() if key != "trial"}
        ledger = ledger_of(run)
        _begin(ledger, trial, point, _handed_over())
        folder = ledger.folder(trial)
        built = trial_run(run, base, point, folder, timestamp=timestamp)

        def reporter_of(steps: int) -> _Reporter:
            ledger.set_steps(trial, steps)
            return _Reporter(run, trial, steps, built.train.eval_every_steps)

        _train(built, parent, reporter_of)

    return run_trial
