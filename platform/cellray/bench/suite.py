"""The benchmark job: every method and baseline on one split, every result a run in MLflow.

One parent run holds the aggregate; one child run per (method, seed) holds parameters, metrics and
predictions. The table is computed from the children by query. Each finished (method, seed) is kept
in the run directory, so that an interrupted benchmark goes on where it stood; a method that fails
is shown as failed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from cellray.baselines.base import baseline
from cellray.bench.pictures import draw_umap
from cellray.bench.record import (
    Setting,
    experiment_name,
    kept_file,
    record,
    rows_from_children,
)
from cellray.bench.render import render_markdown, render_terminal
from cellray.bench.report import plot_confusion, write_report
from cellray.bench.table import ResultRow, leaderboard, to_frame
from cellray.core.errors import CellrayError, ConfigError
from cellray.core.section import apply_overrides, flatten, merge, read_toml, to_dict
from cellray.infer.load import load
from cellray.tasks.base import task
from cellray.train.finetune import finetune, predict_labels, prepare_finetune
from cellray.train.prepare import select_cells
from cellray.train.rundir import RunDirectory
from cellray.train.tracking import (
    Tracker,
    check_tracking,
    code_version,
    open_command,
    tracking_uri,
)

if TYPE_CHECKING:
    from cellray.runs import BenchmarkRun, FinetuneRun

__all__ = ["BenchmarkResult", "benchmark", "check_benchmark"]

Say = Callable[[str], None]
_BLOCK_CELLS = 4096


@dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark found.

    Attributes:
        table: the leaderboard, one row a method.
        text: the same for a terminal.
        umap_path: picture of the best model's cell embedding.
        report_path: self-contained HTML page with the table and the pictures.
        models: method -> exported model of its first seed.
        open_command: opens the MLflow pages.
        mlflow_run_id: the parent run, "" if tracking is off.
    """

    table: pd.DataFrame
    text: str
    umap_path: str
    report_path: str
    models: Mapping[str, str]
    open_command: str
    mlflow_run_id: str = ""

    def lines(self) -> list[str]:
        """What the command line prints."""
        told = ["", self.text, ""]
        told += [f"checkpoint ({name}): {path}" for name, path in self.models.items()]
        told += [f"UMAP picture: {self.umap_path}"] if self.umap_path else []
        told.append(f"report: {self.report_path}")
        return told + ([f"MLflow: {self.open_command}"] if self.open_command else [])


def method_run(run: BenchmarkRun, method: str, seed: int) -> FinetuneRun:
    """The fine-tuning run of one cell of the table, validated.

    Its task and selection of cells are the benchmark's, whatever its own file says.
    """
    from cellray.runs import FinetuneRun, build_run

    data = to_dict(run.data)
    shared = ("uri", "measurement", "layer", "obs_filter", "min_genes_per_cell")
    raw = merge(
        read_toml(run.methods[method]),
        {
            "name": f"{method}-seed{seed}",
            "seed": seed,
            "data": {key: data[key] for key in shared},
            "checkpoint": {"dir": str(RunDirectory(run.checkpoint.dir, run.name).path)},
            "tracking": to_dict(run.tracking)
            | {
                "mlflow_uri": tracking_uri(run.tracking, run.checkpoint.dir),
                "experiment": run.tracking.experiment or f"benchmark-{to_dict(run.task)['name']}",
            },
        },
    )
    raw["task"] = to_dict(run.task)
    if seed != run.seeds[0]:
        raw.pop("register_as", None)  # one version a method, not one a seed
    raw = apply_overrides(raw, run.overrides)
    built = build_run("finetune", raw, source=f"{run.methods[method]} for '{method}'")
    assert isinstance(built, FinetuneRun)
    return built


def _setting(run: BenchmarkRun, tracker: Tracker | None, directory: Path) -> Setting:
    unit = task(run.task.name)  # type: ignore[attr-defined]
    cells = select_cells(run.data, lambda known: unit.columns(run.task, known))
    split = unit.split(cells.keyed(), run.task, seed=0)
    targets = unit.fit(cells.obs, run.task, split)
    template = ResultRow(
        task=unit.name,
        dataset_id="+".join(Path(uri).name for uri in run.data.uris),
        method="",
        method_family="baseline",
        status="skipped",
        dataset_sha256=cells.store.fingerprint(cells.joinids),
        split_id=split.unit,
        split_sha256=split.split_sha256,
        split_unit=split.unit,
        n_cells=len(cells.joinids),
        n_genes=cells.store.num_genes,
        n_train=len(split.train),
        n_val=len(split.validation),
        n_test=len(split.test),
        git_commit=code_version()["git_commit"],
    )
    return Setting(run, unit, cells, split, targets, template, directory, tracker)


def _counts(setting: Setting, joinids: npt.NDArray[np.int64]) -> sparse.csr_matrix:
    """Raw counts of cells over all genes of the store, (N, V) float32."""
    store = setting.cells.store
    every = np.arange(store.num_genes, dtype=np.int32)
    parts = []
    for first in range(0, len(joinids), _BLOCK_CELLS):
        block = store.read_block(joinids[first : first + _BLOCK_CELLS], every)
        shape = (len(block), store.num_genes)
        parts.append(sparse.csr_matrix((block.counts, block.genes, block.indptr), shape=shape))
    return sparse.csr_matrix(sparse.vstack(parts))


def _run_baselines(setting: Setting, say: Say) -> None:
    """Every baseline with every seed, on the cells that models train on."""
    train, test = setting.split.train, setting.split.test
    todo = [
        (name, seed)
        for name in setting.run.baselines
        for seed in setting.run.seeds
        if not kept_file(setting, name, seed).is_file()
    ]
    if not todo:
        return
    train_counts, test_counts = _counts(setting, train), _counts(setting, test)
    rows = np.searchsorted(setting.cells.joinids, train)
    labels = setting.targets.codes[rows]
    classes = np.asarray(setting.targets.classes, dtype=object)
    for name, seed in todo:
        unit = baseline(name)
        config = unit.config(name=name)
        started = time.perf_counter()
        predictor = unit.fit(config, train_counts, labels, seed)
        predicted = classes[predictor.predict(test_counts)]
        seconds = time.perf_counter() - started
        template = replace(
            setting.template,
            method=name,
            seed=seed,
            seed_scope=unit.seed_scope,
            params_json=json.dumps(to_dict(config)),
            wall_s=seconds,
            overlap_flag="none",
        )
        record(setting, template, predicted, say, params=to_dict(config))


def _run_methods(setting: Setting, say: Say) -> dict[str, str]:
    """Fine-tune every method with every seed; returns method -> model of its first seed."""
    models: dict[str, str] = {}
    for method in setting.run.methods:
        for seed in setting.run.seeds:
            run = method_run(setting.run, method, seed)
            model = RunDirectory(run.checkpoint.dir, run.name).model
            if not kept_file(setting, method, seed).is_file():
                _run_method(setting, method, run, say)
            if model.is_dir():
                models.setdefault(method, str(model))
    return models


def _run_method(setting: Setting, method: str, run: FinetuneRun, say: Say) -> None:
    started = time.perf_counter()
    template = replace(
        setting.template,
        method=method,
        method_family="foundation_ft" if run.init_from else "from_scratch",
        seed=run.seed,
        seed_scope="init, batch order, validation cells",
        init="pretrained" if run.init_from else "scratch",
        checkpoint_id=run.init_from,
        params_json=json.dumps(to_dict(run)),
        world_size=run.scale.workers,
        precision=run.train.precision,
    )
    params = to_dict(run)
    parent = setting.tracker.run_id if setting.tracker else None
    try:
        prepared = prepare_finetune(run)
        result = finetune(run, say, parent=parent, prepared=prepared, look_at_test=False)
        model = load(result.trained.model_dir)
        predicted = predict_labels(model, prepared, setting.split.test)
    except (CellrayError, RuntimeError, OSError) as error:
        begun = RunDirectory(run.checkpoint.dir, run.name).read("mlflow.json")
        child = Tracker(begun["uri"], begun["run_id"]) if begun else None
        record(setting, template, None, say, params=params, error=_short(error), tracker=child)
        return
    child = None
    if setting.tracker is not None and result.trained.mlflow_run_id:
        child = Tracker(setting.tracker.uri, result.trained.mlflow_run_id)
    template = replace(
        template,
        wall_s=time.perf_counter() - started,
        cells_per_s=result.trained.metrics.get("cells_per_s"),
    )
    record(setting, template, predicted, say, params={}, tracker=child)


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:500]


def check_benchmark(run: BenchmarkRun) -> list[str]:
    """Check baselines, tracking, data, split and every method; returns lines for ``--check``.

    Raises:
        ConfigError: a compulsory baseline is left out.
        CellrayError: a configuration or the data do not fit.
    """
    unit = task(run.task.name)  # type: ignore[attr-defined]
    absent = [name for name in unit.compulsory if name not in run.baselines]
    if absent:
        raise ConfigError(
            f"baselines = {run.baselines} lacks {', '.join(absent)}; a table of task "
            f"'{unit.name}' is not shown without {', '.join(unit.compulsory)}"
        )
    uri = tracking_uri(run.tracking, run.checkpoint.dir)
    if run.tracking.enabled:
        check_tracking(uri)
    for name in run.baselines:
        baseline(name)
    split = _setting(run, None, Path()).split
    for method in run.methods:
        prepare_finetune(method_run(run, method, run.seeds[0]))
    return [
        f"cells: {len(split.train)} to train on, {len(split.validation)} to validate on, "
        f"{len(split.test)} to test on, held out by {split.unit}",
        f"runs: {len(run.methods) * len(run.seeds)} fine-tunings ({', '.join(run.methods)}), "
        f"{len(run.baselines) * len(run.seeds)} baseline fits",
        *[f"warning: {warning}" for warning in split.warnings],
    ]


def benchmark(run: BenchmarkRun, say: Say) -> BenchmarkResult:
    """Run or continue a benchmark.

    Raises:
        CellrayError: as in :func:`check_benchmark`, before anything is trained.
    """
    check_benchmark(run)
    uri = tracking_uri(run.tracking, run.checkpoint.dir)
    directory = RunDirectory(run.checkpoint.dir, run.name)
    setting = _setting(run, None, directory.path)
    prints = {"data": setting.template.dataset_sha256, "split": setting.split.split_sha256}
    directory.enter(to_dict(run), prints, run.checkpoint.resume)
    for warning in setting.split.warnings:
        say(f"warning: {warning}")
    tracker = _parent(run, directory, uri) if run.tracking.enabled else None
    setting = replace(setting, tracker=tracker)
    status = "FAILED"
    try:
        _run_baselines(setting, say)
        models = _run_methods(setting, say)
        result = _conclude(setting, models, uri)
        status = "FINISHED"
    finally:
        if tracker is not None:
            tracker.end(status)
    return result


def _parent(run: BenchmarkRun, directory: RunDirectory, uri: str) -> Tracker:
    old = directory.read("mlflow.json")
    if old.get("uri") == uri:
        tracker = Tracker(uri, old["run_id"])
        tracker.restart()
        return tracker
    tracker = Tracker.start(uri, experiment=experiment_name(run), name=run.name)
    directory.write("mlflow.json", {"uri": uri, "run_id": tracker.run_id})
    tracker.params(flatten(to_dict(run)))
    return tracker


def _pictures(setting: Setting, models: Mapping[str, str], board: pd.DataFrame) -> dict[str, Path]:
    """The best model's embedding and confusion matrix; nothing without a model."""
    best = next((m for m in board["method"] if m in models), None)
    if best is None:
        return {}
    seed = setting.run.seeds[0]
    kept = pd.read_csv(kept_file(setting, best, seed).with_suffix(".csv"))
    confusion = plot_confusion(
        setting.truth,
        kept["predicted"].astype(str).to_numpy(),
        path=setting.directory / "confusion.png",
        title=f"{best}, seed {seed}: test cells",
    )
    umap = draw_umap(
        models[best],
        setting.cells,
        setting.split,
        label=to_dict(setting.run.task)["label"],
        predictions=dict(zip(kept["joinid"], kept["predicted"].astype(str), strict=True)),
        title=f"{best}, seed {seed}: cell embedding after fine-tuning",
        path=setting.directory / "umap.png",
    )
    return {"cell embedding": umap, "confusion matrix": confusion}


def _report(setting: Setting, board: pd.DataFrame, pictures: Mapping[str, Path]) -> Path:
    """The page with table, facts and pictures."""
    template = setting.template
    facts = {
        "task": template.task,
        "data": f"{setting.cells.store.uri} ({template.n_cells} cells, {template.n_genes} genes)",
        "data SHA-256": template.dataset_sha256,
        "held out": f"{template.split_unit} ({template.n_test} test cells)",
        "split SHA-256": template.split_sha256,
        "code": template.git_commit,
    }
    return write_report(
        setting.directory / "report.html",
        title=f"{setting.run.name}: {template.task}",
        board=board,
        facts=facts,
        pictures=pictures,
        warnings=setting.split.warnings,
    )


def _conclude(setting: Setting, models: Mapping[str, str], uri: str) -> BenchmarkResult:
    """Aggregate, draw, and log to the parent."""
    rows = rows_from_children(setting)
    board = leaderboard(rows, headline=setting.unit.headline, compulsory=setting.unit.compulsory)
    text = render_terminal(board)
    folder = setting.directory
    pictures = _pictures(setting, models, board)
    report = _report(setting, board, pictures)
    (folder / "leaderboard.md").write_text(render_markdown(board) + "\n")
    board.to_csv(folder / "leaderboard.csv", index=False)
    if setting.tracker is not None:
        tracker = setting.tracker
        tracker.table(to_frame(rows), "tables/results_long.json")
        tracker.table(board, "tables/leaderboard.json")
        tracker.note(render_markdown(board))
        for path in (*pictures.values(), report):
            tracker.artifact(path, "report")
    return BenchmarkResult(
        table=board,
        text=text,
        umap_path=str(pictures.get("cell embedding", "")),
        report_path=str(report),
        models=models,
        open_command=open_command(uri) if setting.tracker else "",
        mlflow_run_id=setting.tracker.run_id if setting.tracker else "",
    )
