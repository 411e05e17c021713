"""What a sweep has on disk about its trials: the truth that a killed sweep goes on from.

``trials/trial003.json`` is what the driver notes of trial 3; ``trials/trial003`` is its run
directory, an ordinary one of fine-tuning. A trial that has taken over another's weights (population
based training) goes on in ``trials/trial003.1`` and so on: what is left of the killed workers of
the folder before cannot write into the new one.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellray.core.errors import CheckpointError
from cellray.core.jsonfile import read_table
from cellray.train.checkpoint import verify
from cellray.train.saving import NOTES, committed, newest_whole

__all__ = ["ENDED", "Ledger", "Report", "trial_name"]

FINISHED, STOPPED, FAILED, OPEN = "finished", "stopped early", "failed", "not finished"
ENDED = (FINISHED, STOPPED)
_POINT = "point.json"
_STEPS = "steps.json"
_TRIES = 3


def trial_name(trial: int) -> str:
    """``trial003``."""
    return f"trial{trial:03d}"


@dataclass(frozen=True)
class Report:
    """One validation of a trial.

    Attributes:
        step: optimizer steps taken.
        metrics: everything that was reported.
    """

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Ledger:
    """The trials of one sweep.

    Attributes:
        root: the sweep's ``trials`` folder.
    """

    root: Path

    def read(self, trial: int) -> dict[str, Any]:
        """What the driver has noted of a trial; {} if nothing."""
        return _read(self.root / f"{trial_name(trial)}.json")

    def note(self, trial: int, **facts: Any) -> None:
        """Add to what is noted of a trial; survives a kill at any moment."""
        self.root.mkdir(parents=True, exist_ok=True)
        _write(self.root / f"{trial_name(trial)}.json", {**self.read(trial), **facts})

    def known(self) -> list[int]:
        """Numbers of the trials that have been proposed."""
        found = (re.fullmatch(r"trial(\d+)\.json", file.name) for file in self.root.glob("*.json"))
        return sorted(int(match[1]) for match in found if match)

    def folders(self, trial: int) -> list[Path]:
        """The trial's run directories, the current one last."""
        name = trial_name(trial)
        later = [
            (int(path.suffix[1:]), path)
            for path in self.root.glob(f"{name}.*")
            if path.suffix[1:].isdigit() and path.is_dir()
        ]
        return [self.root / name, *(path for _, path in sorted(later))]

    def folder(self, trial: int) -> Path:
        """The trial's current run directory."""
        return self.folders(trial)[-1]

    def point(self, trial: int) -> dict[str, Any]:
        """The values the trial has now."""
        now = _read(self.folder(trial) / _POINT) or self.read(trial)
        return dict(now.get("point", {}))

    def changes(self, trial: int) -> list[dict[str, Any]]:
        """Where the trial took over another's weights: step, from which trial, values since."""
        return list(_read(self.folder(trial) / _POINT).get("changes", []))

    def steps(self, trial: int) -> int:
        """Optimizer steps of the whole run; 0 before it began."""
        return int(_read(self.folder(trial) / _STEPS).get("steps", 0))

    def set_steps(self, trial: int, steps: int) -> None:
        """Note how long the trial's run is; done by the trial, as it alone has looked."""
        folder = self.folder(trial)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / _STEPS, {"steps": steps})

    def state(self, trial: int) -> str:
        """``finished``, ``stopped early``, ``failed`` or ``not finished``."""
        if (self.folder(trial) / "result.json").is_file():
            return FINISHED
        noted = str(self.read(trial).get("state", OPEN))
        return noted if noted in (STOPPED, FAILED) else OPEN

    def stop(self, trial: int, step: int) -> None:
        """Note that the scheduler has stopped a trial at its report of a step."""
        self.note(trial, state=STOPPED, stopped_at=step)

    def reports(self, trial: int, every: int) -> list[Report]:
        """The validations of a trial at the steps that trials are compared at.

        Args:
            trial: its number.
            every: ``train.eval_every_steps``; the last step counts besides.
        """
        file = self.folder(trial) / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        last, noted = self.steps(trial), self.read(trial)
        if noted.get("state") == STOPPED:  # it trained on until its process was gone
            rows = [row for row in rows if row["step"] <= noted["stopped_at"]]
        found = [Report(int(row["step"]), row) for row in rows]
        return [
            r
            for r in found
            if (r.step % every == 0 or r.step == last)
            and any(name.startswith("validation/") for name in r.metrics)
        ]

    def value(self, trial: int, metric: str, mode: str, *, every: int, last: bool) -> float:
        """The metric of a trial: the best of its reports, or the last one; NaN without any."""
        values = [r.metrics.get(metric, math.nan) for r in self.reports(trial, every)]
        values = [v for v in values if not math.isnan(v)]
        if not values:
            return math.nan
        return values[-1] if last else (min(values) if mode == "min" else max(values))

    def take_over(self, trial: int, donor: int, name: str, point: dict[str, Any]) -> None:
        """Give a trial a new run directory that goes on from another trial's checkpoint.

        Args:
            trial: that goes on.
            donor: whose weights it takes.
            name: of the donor's checkpoint; its newest whole one, if that has gone.
            point: the trial's values from here on.

        Raises:
            CheckpointError: the donor has no whole checkpoint.
        """
        before = self.folder(trial)
        number = len(self.folders(trial))
        made = self.root / f"{trial_name(trial)}.{number}"
        partial = made.with_name(f"{made.name}-partial")
        note = self._fetch(donor, name, partial)
        step = int(note["step"])
        (partial / NOTES).write_text(json.dumps(note) + "\n", encoding="utf-8")
        if (before / "mlflow.json").is_file():
            shutil.copy(before / "mlflow.json", partial / "mlflow.json")
        history = before / "metrics.jsonl"
        rows = history.read_text(encoding="utf-8").splitlines() if history.is_file() else []
        kept = [row for row in rows if json.loads(row)["step"] < step]
        kept.append(json.dumps({k: v for k, v in note.items() if k != "name"}))
        (partial / "metrics.jsonl").write_text("".join(f"{row}\n" for row in kept))
        change = {"step": step, "from": donor, "point": point}
        _write(partial / _POINT, {"point": point, "changes": [*self.changes(trial), change]})
        partial.rename(made)
        for old in self.folders(trial)[:-2]:  # its checkpoints serve nobody any more
            shutil.rmtree(old / "checkpoints", ignore_errors=True)

    def _fetch(self, donor: int, name: str, target: Path) -> dict[str, Any]:
        """Copy a checkpoint of the donor; it may be making room for a newer one meanwhile."""
        for _ in range(_TRIES):
            places = [p / "checkpoints" / name for p in self.folders(donor)] if name else []
            source = next((place for place in places if place.is_dir()), None)
            if source is None:
                source, _ = newest_whole(self.folder(donor))
            if source is None:
                break
            notes = {str(n["name"]): n for n in committed(source.parent.parent)}
            shutil.rmtree(target, ignore_errors=True)
            copy = target / "checkpoints" / source.name
            try:
                shutil.copytree(source, copy, copy_function=_link)
                verify(copy)
            except (OSError, shutil.Error, CheckpointError):
                name = ""
                continue
            if source.name in notes:
                return notes[source.name]
        raise CheckpointError(
            f"{trial_name(donor)} in {self.root} has no whole checkpoint to go on from"
        )


def _link(source: str, target: str) -> str:
    """A second name for a file that nobody writes again; a copy where there are no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    cure = "restore it from a copy, or give the sweep another name"
    return read_table(file, what="note of a sweep", cure=cure)


def _write(file: Path, value: dict[str, Any]) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(partial, file)
