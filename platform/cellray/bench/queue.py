"""The cells of a benchmark's tables as Ray tasks, a few at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray

from cellray.bench.entries import Entry
from cellray.bench.record import kept_file, record, record_failure
from cellray.bench.rows import Status
from cellray.bench.setting import Parent, Setting, open_setting
from cellray.bench.work import answer_of
from cellray.core.errors import CellrayError
from cellray.core.section import read_toml, to_dict
from cellray.metrics.base import metric

if TYPE_CHECKING:
    from cellray.runs import BenchmarkRun

__all__ = ["Queue", "Work"]

Say = Callable[[str], None]
_WORK_CPUS = 0.5  # of a cell that trains: its workers reserve their own


@dataclass(frozen=True)
class Work:
    """Cells of a table that are worked on together, by one Ray task.

    Attributes:
        dataset: its name.
        entry: the row.
        seeds: those still to do; a fine-tuning run has one, the others share what they read.
    """

    dataset: str
    entry: Entry
    seeds: tuple[int, ...]


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:500]


def _work(
    raw: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
    work: Work,
    parent: Parent | None,
    here: str,
) -> list[str]:
    """Do a unit of work in a process of its own; returns what is to be said, a line a cell."""
    from cellray.runs import BenchmarkRun, build_run

    if os.path.isdir(here):
        os.chdir(here)  # paths of a configuration are the driver's
    run = build_run("benchmark", raw)
    assert isinstance(run, BenchmarkRun)
    setting = open_setting(run, work.dataset, parent, files)
    told = []
    for seed in work.seeds:
        part = setting.part(seed)
        cell = f"{work.entry.name} on {work.dataset}, seed {seed}"
        try:
            rows = record(setting, part, work.entry, answer_of(setting, part, work.entry))
        except (CellrayError, RuntimeError, OSError, ValueError, ArithmeticError) as error:
            record_failure(setting, part, work.entry, _short(error))
            told.append(f"{cell}: failed: {_short(error)}")
            continue
        shown = next((r for r in rows if r.metric_id == setting.unit.headline), rows[0])
        told.append(f"{cell}: {metric(shown.metric_id).title} {shown.value:.4f}")
    return told


def _files(run: BenchmarkRun) -> dict[str, Mapping[str, Any]]:
    """The fine-tuning files that the methods name, path -> tables."""
    methods = [
        *run.methods.values(),
        *(m for d in run.datasets.values() for m in d.methods.values()),
    ]
    paths = {path for m in methods for path in (m.config, m.scratch_config) if path}
    return {path: read_toml(path) for path in sorted(paths)}


_DEATHS = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.LocalRayletDiedError,
)


class Queue:
    """Units of work as Ray tasks, a few at a time, with what is said of each."""

    def __init__(
        self, run: BenchmarkRun, parents: Mapping[str, Parent | None], say: Say, at_a_time: int
    ) -> None:
        raw: Mapping[str, Any] = {k: v for k, v in to_dict(run).items() if v is not None}
        self._raw, self._files = ray.put(raw), ray.put(_files(run))
        self._at_a_time, self._parents, self._say = at_a_time, parents, say
        self._task = ray.remote(_work)
        self._began = time.time()

    def _submit(self, work: Work) -> Any:
        cpus = _WORK_CPUS if work.entry.kind == "finetune" else 1.0
        options = self._task.options(
            num_cpus=cpus, max_retries=0, name=f"{work.entry.name}@{work.dataset}"
        )
        parent = self._parents[work.dataset]
        return options.remote(self._raw, self._files, work, parent, os.getcwd())

    def run(self, works: Sequence[Work], settings: Mapping[str, Setting]) -> None:
        """Do all work; a process that dies is started once more, then its cells failed."""
        total, done, started = sum(len(w.seeds) for w in works), 0, time.monotonic()
        waiting = list(works)
        running: dict[Any, Work] = {}
        retried: set[tuple[str, str, int]] = set()
        try:
            while waiting or running:
                while waiting and len(running) < self._at_a_time:
                    work = waiting.pop(0)
                    running[self._submit(work)] = work
                (ended,), _ = ray.wait(list(running), num_returns=1)
                work = running.pop(ended)
                setting = settings[work.dataset]
                again = self._died(ended, work, setting)
                at = (work.dataset, work.entry.name, again.seeds[0] if again else 0)
                if again is not None and at not in retried:
                    retried.add(at)
                    self._say(f"{work.entry.name} on {work.dataset}: its process died; once more")
                    waiting.append(again)
                    done += len(work.seeds) - len(again.seeds)
                    continue
                lines = self._outcome(ended, work, setting)
                done += len(work.seeds)
                left = (time.monotonic() - started) / done * (total - done)
                for line in lines:
                    self._say(line)
                self._say(f"{done}/{total} cells of the tables  ETA {left:.0f} s")
        except KeyboardInterrupt:
            for task in running:
                ray.cancel(task, force=True)
            self._say("interrupted: finished cells are kept, the same command does the others")
            raise

    def _died(self, task: Any, work: Work, setting: Setting) -> Work | None:
        """What is left to do if the task's process died; None if it ended in any other way.

        One that ran out of memory would do so again.
        """
        try:
            ray.get(task)
        except ray.exceptions.OutOfMemoryError:
            return None
        except _DEATHS:
            undone = self._undone(work, setting)
            return replace(work, seeds=undone) if undone else None
        except ray.exceptions.RayError:
            return None
        return None

    def _undone(self, work: Work, setting: Setting) -> tuple[int, ...]:
        """Seeds that have neither a result nor a failure of their own in this run."""

        def done(seed: int) -> bool:
            file = kept_file(setting, work.entry, seed)
            failed = file.with_suffix(".failed")
            return file.is_file() or (failed.is_file() and failed.stat().st_mtime >= self._began)

        return tuple(seed for seed in work.seeds if not done(seed))

    def _outcome(self, task: Any, work: Work, setting: Setting) -> list[str]:
        try:
            told: list[str] = ray.get(task)
            return told
        except ray.exceptions.RayError as error:
            how: Status = "oom" if isinstance(error, ray.exceptions.OutOfMemoryError) else "failed"
            text = _short(error)
            undone = self._undone(work, setting)
            for seed in undone:
                record_failure(setting, setting.part(seed), work.entry, text, status=how)
            if not undone:
                return [
                    f"{work.entry.name} on {work.dataset}: done; then its process ended: {text}"
                ]
            return [f"{work.entry.name} on {work.dataset}: failed: {text}"]
