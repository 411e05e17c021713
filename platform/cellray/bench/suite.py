"""The benchmark job: method x data set x seed as Ray tasks, every result a run in MLflow.

One MLflow parent a data set and split holds the aggregate; one child a (method, seed) holds
parameters, metrics and answers. The tables are computed from the children by query. Each finished
cell of a table is kept in the run directory, so that an interrupted benchmark goes on where it
stood; a cell that fails is shown as failed, and tried again by the same command.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import ray

from cellray.bench.conclude import Table, conclude, write_page
from cellray.bench.entries import (
    Entry,
    check_names,
    compulsory_of,
    entries_of,
    finetune_run,
    left_out,
    made_by,
)
from cellray.bench.genes import gene_rows, vocabulary_of
from cellray.bench.record import kept_file, log_kept, record, record_failure
from cellray.bench.rows import Status, kept_rows
from cellray.bench.setting import Parent, Setting, open_setting
from cellray.bench.work import (
    answer_of,
    answering_model,
    checkpoint_of,
    tokens_of,
    tuning_budget,
    weights_sha256,
)
from cellray.core.errors import CellrayError, ConfigError, DataError
from cellray.core.section import flatten, read_toml, to_dict
from cellray.metrics.base import metric
from cellray.train.checkpoint import Manifest
from cellray.train.finetune import prepare_finetune
from cellray.train.rundir import RunDirectory
from cellray.train.tracking import Tracker, check_tracking, open_command, tracking_uri
from cellray.train.trainer import cpus_needed, ensure_ray, kept_interrupt

if TYPE_CHECKING:
    from cellray.runs import BenchmarkRun
    from cellray.train.config import ScaleSection

__all__ = ["BenchmarkResult", "benchmark", "check_benchmark"]

Say = Callable[[str], None]
_WORK_CPUS = 0.5  # of a cell that trains: its workers reserve their own


@dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark found.

    Attributes:
        tables: data set -> leaderboard, one row a method.
        text: the tables for a terminal.
        report_path: self-contained HTML page with tables and pictures.
        pictures: data set -> title -> PNG.
        models: data set -> method -> exported model of its first seed.
        open_command: opens the MLflow pages.
        mlflow_run_ids: data set -> its parent run; empty if tracking is off.
    """

    tables: Mapping[str, pd.DataFrame]
    text: str
    report_path: str
    pictures: Mapping[str, Mapping[str, str]]
    models: Mapping[str, Mapping[str, str]]
    open_command: str
    mlflow_run_ids: Mapping[str, str]

    def lines(self) -> list[str]:
        """What the command line prints."""
        told = ["", self.text, ""]
        for models in self.models.values():
            told += [f"checkpoint ({name}): {path}" for name, path in models.items()]
        told.append(f"report: {self.report_path}")
        return told + ([f"MLflow: {self.open_command}"] if self.open_command else [])


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


def _entries(setting: Setting) -> list[Entry]:
    """All rows of a data set's table; those on a model's genes need the models to be there."""
    rows = entries_of(setting)
    rows += gene_rows(setting, rows)
    check_names(rows)
    return rows


def _directory(run: BenchmarkRun) -> RunDirectory:
    return RunDirectory(run.checkpoint.dir, run.name)


def _scales(setting: Setting, entries: Sequence[Entry]) -> list[ScaleSection]:
    """What the fine-tuning runs of a data set reserve."""
    seed = setting.run.seeds[0]
    return [finetune_run(setting, e, seed).scale for e in entries if e.kind == "finetune"]


def _check_kept(setting: Setting, entries: Sequence[Entry]) -> None:
    """Refuse to mix results of two configurations, or two checkpoints, of one method.

    Raises:
        ConfigError: a kept result was made by another one.
        DataError: one is damaged.
    """
    for entry in entries:
        for seed in setting.run.seeds:
            file = kept_file(setting, entry, seed)
            if not file.is_file():
                continue
            row = kept_rows(file)[0]
            kept = flatten(json.loads(row.params_json))
            now = flatten(made_by(setting, entry, seed))
            free = ("tracking.", "checkpoint.", "scale.", "tuning_budget")
            differ = sorted(
                k
                for k in set(kept) | set(now)
                if kept.get(k) != now.get(k) and not k.startswith(free)
            )
            if row.tuning_budget != tuning_budget(setting, entry):
                differ.append("tuning_budget")
            if entry.kind == "baseline" and entry.base:
                genes = vocabulary_of(setting, entry, seed).fingerprint[:16]
                differ += ["the genes of its model"] * (row.gene_map_id != genes)
            checkpoint = checkpoint_of(setting, entry, seed)
            if checkpoint and row.checkpoint_sha256 != weights_sha256(checkpoint):
                differ.append(f"the weights in '{checkpoint}'")
            if differ:
                raise ConfigError(
                    f"'{file}' holds a result of '{entry.name}' with other settings "
                    f"({', '.join(differ[:3])}); give the benchmark another name, or remove that "
                    f"file and the folder '{setting.directory / file.stem}'"
                )


def _check_models(setting: Setting, entries: Sequence[Entry]) -> None:
    """Open what every method starts from, before anything is run.

    Raises:
        CellrayError: a checkpoint is missing or torn, or does not fit the cells.
    """
    seed = setting.run.seeds[0]
    made: dict[str, Manifest] = {}
    for entry in entries:
        if entry.kind == "finetune":
            made[entry.name] = prepare_finetune(finetune_run(setting, entry, seed)).job.manifest
            if entry.base in made:
                _check_alike(entry, made[entry.name], made[entry.base])
        elif entry.kind == "frozen":
            model = answering_model(setting, entry, seed)
            assert model is not None
            tokens_of(setting, entry, seed, model)


def _check_alike(entry: Entry, scratch: Manifest, other: Manifest) -> None:
    """The row from scratch is the same architecture over the same genes, whatever its file says.

    Raises:
        ConfigError: it is another.
    """

    def shape(manifest: Manifest) -> dict[str, object]:
        free = ("dropout", "drop_path")
        model = {k: v for k, v in manifest.model.items() if not k.endswith(free)}
        return {
            "family": manifest.family,
            "model": model,
            "tokenizer": manifest.tokenizer,
            "vocabulary": manifest.vocab_fingerprint,
        }

    ours, theirs = shape(scratch), shape(other)
    for what in ours:
        if ours[what] != theirs[what]:
            raise ConfigError(
                f"'{entry.name}' is to be '{entry.base}' from scratch, but the {what} of "
                f"'{entry.config}' is another than that of '{entry.base}'; start both files from "
                "one checkpoint (init_from), the one from scratch with init_weights = false"
            )


def check_benchmark(run: BenchmarkRun) -> list[str]:
    """Check baselines, tracking, data, splits and every method; returns lines for ``--check``.

    Raises:
        ConfigError: a compulsory baseline is left out, or a method does not fit the task.
        CellrayError: a configuration or the data do not fit.
    """
    if run.tracking.enabled:
        check_tracking(tracking_uri(run.tracking, run.checkpoint.dir))
    if len(set(run.seeds)) < len(run.seeds):
        raise ConfigError(f"seeds = {run.seeds} holds one twice; give each once")
    lines = []
    for name in run.datasets:
        setting = open_setting(run, name)
        entries = _entries(setting)
        split = setting.first.split
        _check_models(setting, entries)
        if run.checkpoint.resume != "never":
            _check_kept(setting, entries)
        lines += [
            f"{name}: {len(split.train)} cells to train on, {len(split.validation)} to validate "
            f"on, {len(split.test)} to test on, held out by {split.unit}",
            f"{name}: {len(entries)} rows x {len(run.seeds)} seeds, of which "
            f"{sum(e.kind == 'finetune' for e in entries) * len(run.seeds)} fine-tunings: "
            f"{', '.join(e.name for e in entries)}",
            *[f"{name}: {told}" for told in left_out(setting)],
            *[f"{name}: warning: {warning}" for warning in setting.guards.warnings],
        ]
    return lines


def _parent(setting: Setting, uri: str) -> Parent:
    """The MLflow run of a data set: the one it began with, else a new one."""
    run, unit = setting.run, setting.unit
    experiment = run.tracking.experiment or f"benchmark-{unit.name}"
    setting.directory.mkdir(parents=True, exist_ok=True)
    notes = RunDirectory(str(setting.directory.parent), setting.directory.name)
    old = notes.read("mlflow.json")
    if old.get("uri") == uri:
        Tracker(uri, old["run_id"]).restart()
        return Parent(uri, old["run_id"], experiment)
    tags = {**setting.tags(), "cellray.compulsory": json.dumps(compulsory_of(setting))}
    tracker = Tracker.start(
        uri, experiment=experiment, name=f"{run.name}: {setting.name}", tags=tags
    )
    notes.write("mlflow.json", {"uri": uri, "run_id": tracker.run_id})
    table = {k: v for k, v in to_dict(run).items() if k != "datasets"}
    tracker.params(flatten({**table, **to_dict(setting.section)}))
    return Parent(uri, tracker.run_id, experiment)


def _to_do(setting: Setting, entries: Sequence[Entry]) -> list[Work]:
    """The cells of a table that are not finished, as units of work."""
    works = []
    for entry in entries:
        seeds = [s for s in setting.run.seeds if not kept_file(setting, entry, s).is_file()]
        if entry.kind == "finetune":
            works += [Work(setting.name, entry, (seed,)) for seed in seeds]
        elif seeds:
            works.append(Work(setting.name, entry, tuple(seeds)))
    return works


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


class _Queue:
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


def _enter(run: BenchmarkRun, settings: Mapping[str, Setting]) -> None:
    """Take the run directory; it stays with one configuration and one state of the data."""
    prints = {}
    for name, setting in settings.items():
        prints[f"data of {name}"] = setting.template.dataset_sha256
        prints[f"split of {name}"] = setting.template.split_sha256
    _directory(run).enter(to_dict(run), prints, run.checkpoint.resume)


def benchmark(run: BenchmarkRun, say: Say) -> BenchmarkResult:
    """Run or continue a benchmark.

    Raises:
        CellrayError: as in :func:`check_benchmark`, before anything is trained.
    """
    check_benchmark(run)
    with _directory(run).held():
        uri = tracking_uri(run.tracking, run.checkpoint.dir)
        settings = {name: open_setting(run, name) for name in run.datasets}
        _enter(run, settings)
        entries, parents = {}, {}
        for name, setting in settings.items():
            for warning in (*left_out(setting), *setting.guards.warnings):
                say(f"{name}: warning: {warning}")
            entries[name] = _entries(setting)
            parents[name] = _parent(setting, uri) if run.tracking.enabled else None
        settings = {name: replace(s, parent=parents[name]) for name, s in settings.items()}
        for name, setting in settings.items():
            if logged := log_kept(setting, entries[name]):
                say(f"{name}: {logged} finished cells of the table are logged to MLflow now")
        works = [work for name, s in settings.items() for work in _to_do(s, entries[name])]
        status = "FAILED"
        try:
            if works:
                at_a_time = _start_ray(run, settings, entries)
                if at_a_time < run.concurrent:
                    say(f"the cluster has room for {at_a_time} of concurrent = {run.concurrent}")
                with kept_interrupt():
                    _Queue(run, parents, say, at_a_time).run(works, settings)
            tables, wrong = _conclude(settings, entries, say)
            result = _result(run, tables, uri) if tables else None
            if wrong or result is None:
                raise DataError("; ".join(f"{name}: {error}" for name, error in wrong.items()))
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            for parent in parents.values():
                if parent is not None:
                    Tracker(parent.uri, parent.run_id).end(status)
        return result


def _start_ray(
    run: BenchmarkRun, settings: Mapping[str, Setting], entries: Mapping[str, Sequence[Entry]]
) -> int:
    """A cluster for the largest cells of the tables; how many of them fit side by side.

    Raises:
        ConfigError: not even one fits.
    """
    scales = [scale for name, s in settings.items() for scale in _scales(s, entries[name])]
    largest = max(scales, key=cpus_needed, default=None)
    if not ray.is_initialized():
        ensure_ray(largest, extra_cpus=run.concurrent * 1.0, times=run.concurrent)
    ensure_ray(largest, extra_cpus=1.0)
    each = 1.0 + (cpus_needed(largest) if largest else 0.0)
    return max(1, min(run.concurrent, int(ray.cluster_resources().get("CPU", 1) // each)))


def _conclude(
    settings: Mapping[str, Setting], entries: Mapping[str, Sequence[Entry]], say: Say
) -> tuple[list[Table], dict[str, str]]:
    """The tables that can be shown, and why the others cannot: one bad set hides no other."""
    tables, wrong = [], {}
    for name, setting in settings.items():
        try:
            tables.append(conclude(setting, entries[name]))
        except CellrayError as error:
            wrong[name] = str(error)
            say(f"{name}: no table: {error}")
    return tables, wrong


def _result(run: BenchmarkRun, tables: Sequence[Table], uri: str) -> BenchmarkResult:
    """Write the page over all data sets, and log it to each parent."""
    page = write_page(run.name, tables, _directory(run).path / "report.html")
    for table in tables:
        if table.setting.parent is not None:
            parent = table.setting.parent
            Tracker(parent.uri, parent.run_id).artifact(page, "report")
    return BenchmarkResult(
        tables={t.setting.name: t.board for t in tables},
        text="\n\n".join(t.text for t in tables),
        report_path=str(page),
        pictures={t.setting.name: {k: str(v) for k, v in t.pictures.items()} for t in tables},
        models={t.setting.name: t.models for t in tables},
        open_command=open_command(uri) if run.tracking.enabled else "",
        mlflow_run_ids={
            t.setting.name: t.setting.parent.run_id for t in tables if t.setting.parent
        },
    )
