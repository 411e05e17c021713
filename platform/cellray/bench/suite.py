"""The benchmark job: method x data set x seed as Ray tasks, every result a run in MLflow.

One MLflow parent a data set and split holds the aggregate; one child a (method, seed) holds
parameters, metrics and answers. The tables are computed from the children by query. Each finished
cell of a table is kept in the run directory, so that an interrupted benchmark goes on where it
stood; a cell that fails is shown as failed, and tried again by the same command.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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
from cellray.bench.queue import Queue, Work
from cellray.bench.record import check_answer, kept_file, log_kept
from cellray.bench.rows import kept_rows
from cellray.bench.setting import Parent, Setting, open_setting
from cellray.bench.work import (
    answering_model,
    checkpoint_of,
    tokens_of,
    tuning_budget,
    weights_sha256,
)
from cellray.core.errors import CellrayError, ConfigError, DataError
from cellray.core.section import flatten, to_dict
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
        DataError: one is damaged, or its answers are not those that were scored.
    """
    for entry in entries:
        for seed in setting.run.seeds:
            file = kept_file(setting, entry, seed)
            if not file.is_file():
                continue
            row = kept_rows(file)[0]
            check_answer(setting, entry, row)
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
                    Queue(run, parents, say, at_a_time).run(works, settings)
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
