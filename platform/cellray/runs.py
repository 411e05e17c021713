"""Whole-run sections of the jobs, their cross-field rules, and how a run is executed.

``load_run(job, file, overrides)`` gives a validated run; ``run_job(run)`` executes it. Importing
this module imports no Ray, DeepSpeed, TileDB-SOMA or MLflow.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cellray.bench.config import DatasetSection, MethodSection, plug_benchmark
from cellray.core import registry
from cellray.core.errors import ConfigError, did_you_mean
from cellray.core.section import (
    MAX_SEED,
    Section,
    apply_overrides,
    build_section,
    read_toml,
)
from cellray.data.config import DataSection
from cellray.data.synthetic_config import SynthesizeConfig
from cellray.infer.map_config import QuerySection, ReferenceSection
from cellray.models.base import family, with_preset
from cellray.train.config import (
    AdaptSection,
    BatchSection,
    CheckpointSection,
    EngineSection,
    OptimSection,
    ScaleSection,
    TrackingSection,
    TrainSection,
)
from cellray.train.plan_config import PlanSection
from cellray.train.rules import check_batch

__all__ = [
    "JOBS",
    "BenchmarkRun",
    "EmbedRun",
    "FinetuneRun",
    "IngestRun",
    "MapRun",
    "PretrainRun",
    "Run",
    "SynthesizeRun",
    "TuneRun",
    "build_run",
    "load_run",
    "run_job",
]

Say = Callable[[str], None]


class Run(Section):
    """What every run has.

    Attributes:
        name: the run directory's name: letters, digits, ``.``, ``_`` and ``-``.
        seed: every random choice of the run follows from it.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0, le=MAX_SEED)


class IngestRun(Run):
    """h5ad files into one SOMA experiment; the ``[ingest]`` table is all there is."""

    name: str = Field(default="ingest", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    ingest: Section


class SynthesizeRun(SynthesizeConfig, Run):
    """A synthetic atlas with known biology; its keys stand at the top, without a table."""

    name: str = Field(default="synthesize", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class _TrainingRun(Run):
    """What pretraining and fine-tuning share."""

    data: DataSection
    optim: OptimSection = OptimSection()
    batch: BatchSection = BatchSection()
    train: TrainSection
    engine: EngineSection = EngineSection()
    scale: ScaleSection = ScaleSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _fits(self) -> _TrainingRun:
        check_batch(self.batch, self.scale, self.data)
        steps = self.train.steps
        if steps and self.optim.warmup_steps > steps:
            raise ValueError(
                f"optim.warmup_steps = {self.optim.warmup_steps} is more than train.steps = {steps}"
            )
        return self


class PretrainRun(_TrainingRun):
    """Self-supervised pretraining of one family on the cells of a store.

    Attributes:
        model: the family's configuration; ``family`` names it.
        tokenizer: by default the one the family's source uses.
        objective: by default the one the family's source is pretrained with.
        init_from: checkpoint whose weights and vocabulary training starts with; "" starts anew.
        plan: what ``cellray plan`` counts with instead of opening the store.
    """

    model: Section
    tokenizer: Section
    objective: Section
    init_from: str = ""
    plan: PlanSection | None = None


class FinetuneRun(_TrainingRun):
    """Supervised fine-tuning for a task.

    Attributes:
        task: what is learnt and how cells are split; ``name`` names it.
        init_from: checkpoint to start from; "" trains ``model`` from scratch.
        model: only from scratch: the family's configuration.
        tokenizer: only from scratch; by default the family's.
        init_weights: False keeps architecture, genes and tokenizer of ``init_from`` and draws the
            weights anew, by the seed: the control of pretraining.
        adapt: which weights are trained: all, the last layers, low-rank factors, or the head.
        register_as: name in MLflow's model registry; "" registers nothing.
    """

    task: Section
    init_from: str = ""
    model: Section | None = None
    tokenizer: Section | None = None
    init_weights: bool = True
    adapt: AdaptSection = AdaptSection()
    register_as: str = ""

    @model_validator(mode="after")
    def _one_start(self) -> FinetuneRun:
        if bool(self.init_from) == (self.model is not None):
            raise ValueError(
                "give either init_from (a checkpoint) or a [model] section to train from scratch, "
                f"not {'both' if self.init_from else 'neither'}"
            )
        if not self.init_weights and not self.init_from:
            raise ValueError(
                "init_weights = false needs init_from, the checkpoint whose architecture, genes "
                "and tokenizer it keeps; a [model] section is trained from drawn weights anyway"
            )
        if set(self.register_as) & set("/:") or self.register_as != self.register_as.strip():
            raise ValueError(
                f"register_as = '{self.register_as}': a registered model's name has no '/', no ':' "
                "and no blanks around it"
            )
        return self


class EmbedRun(Run):
    """Zero-shot cell embeddings of a store, with a UMAP picture.

    Attributes:
        model: checkpoint folder or MLflow model URI.
        data: the cells.
        output: folder that receives ``embedding.h5ad`` and ``umap.png``.
        colour_by: obs columns that colour the picture.
        umap: whether to compute the picture.
        cells_micro: cells of a forward pass.
    """

    model: str
    data: DataSection
    output: str
    colour_by: list[str] = []
    umap: bool = True
    cells_micro: int = Field(default=64, ge=1)


class MapRun(Run):
    """Labels of query cells from the nearest cells of a reference.

    Attributes:
        model: checkpoint folder or MLflow model URI; it is not trained.
        reference: the labelled cells, and where their embedding is kept.
        query: the cells to label.
        output: h5ad file to write.
        k: reference cells that vote on a label.
        unknown_below: a cell whose label has a smaller share of the votes is ``Unassigned``.
        exact_below: with fewer reference cells neighbours are found exactly, with more by FAISS.
        umap: whether to lay out queries and reference together, in ``obsm["X_umap"]`` and as a
            picture beside the output.
        umap_cells: reference cells in it, at most.
        cells_micro: cells of a forward pass.
    """

    model: str
    reference: ReferenceSection
    query: QuerySection
    output: str = Field(pattern=r"\.h5ad$")
    k: int = Field(default=10, ge=1)
    unknown_below: float = Field(default=0.0, ge=0, le=1)
    exact_below: int = Field(default=50_000, ge=0)
    umap: bool = False
    umap_cells: int = Field(default=20_000, ge=0)
    cells_micro: int = Field(default=64, ge=1)


class BenchmarkRun(Run):
    """Method x data set x seed of one task, beside the baselines.

    Attributes:
        datasets: name -> cells and split. A file with one data set may give ``[data]`` and
            ``[task]`` instead; beside several these two hold what all share.
        data: of the file alone: None once the run is validated, see ``datasets``.
        task: likewise.
        methods: name of a row -> fine-tuning file (``....toml``), checkpoint, or a table.
        baselines: keys of ``cellray.baselines``; [] takes those without which the task shows no
            table.
        seeds: what "mean and spread" is over: each has validation cells, initial weights and an
            order of its own.
        overrides: ``section.key=value`` laid over every method's file.
        concurrent: cells of the table that are worked on at a time.
        bootstrap_draws: draws of the interval over donors (or batches); 0 makes none.
    """

    datasets: dict[str, DatasetSection]
    data: None = None
    task: None = None
    methods: dict[str, MethodSection] = {}
    baselines: list[str] = []
    seeds: list[Annotated[int, Field(ge=0, le=MAX_SEED)]] = Field(default=[0, 1, 2], min_length=1)
    overrides: list[str] = []
    concurrent: int = Field(default=1, ge=1)
    bootstrap_draws: int = Field(default=1000, ge=0)
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _enough_draws(self) -> BenchmarkRun:
        if self.bootstrap_draws == 1:
            raise ValueError("bootstrap_draws = 1 gives no interval; give 0 for none, or 1000")
        return self


_MORE_IS_BETTER = ("accuracy", "macro_f1")  # metrics of validation; all others are errors


def _way(metric: str) -> str:
    return "max" if metric.rpartition("/")[2] in _MORE_IS_BETTER else "min"


class TuneRun(Run):
    """A Ray Tune sweep of whole fine-tuning runs.

    Attributes:
        base: fine-tuning configuration file that every trial starts from.
        search: key path -> list of choices, or ``{low, high, scale = "log" | "linear"}``, with
            ``points`` where a grid is to walk it.
        algorithm: where the values of a trial come from: ``random`` draws, a ``grid``, or
            ``optuna``, which proposes them from the trials before (TPE).
        scheduler: ``asha`` stops the worse trials early, ``pbt`` has them take over the weights of
            the better ones and go on with other values, ``none`` lets all trials end.
        trials: configurations tried; 0 takes the whole grid, or 4 (fewer where [search] has fewer).
        concurrent: trials at a time; the whole population with ``pbt``.
        trial_cpus: logical CPUs that a trial reserves beside the workers of its training run.
        metric: a validation metric that reports carry; trials are compared by it.
        mode: ``min`` or ``max``; left out, the metric says it: shares of right answers
            (``accuracy``, ``macro_f1``) are maximised, losses and errors minimised.
        grace_reports: reports a trial may make before ASHA may stop it.
        reduction_factor: ASHA keeps one in this many at each rung.
        exploit_reports: reports between two moments at which ``pbt`` compares a trial.
        exploit_fraction: the worst share of the population takes over the best share's weights.
        time_limit_s: a start of the sweep ends after it, with the best so far; 0 has no limit.
        overrides: ``section.key=value`` laid over the base.
    """

    base: str
    search: dict[str, Any]
    algorithm: Literal["random", "grid", "optuna"] = "random"
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    trials: int = Field(default=0, ge=0)
    concurrent: int = Field(default=1, ge=1)
    trial_cpus: float = Field(default=0.5, gt=0)
    metric: str = "validation/loss"
    mode: Literal["min", "max"] = "min"
    grace_reports: int = Field(default=1, ge=1)
    reduction_factor: int = Field(default=2, ge=2)
    exploit_reports: int = Field(default=2, ge=1)
    exploit_fraction: float = Field(default=0.25, gt=0, le=0.5)
    time_limit_s: float = Field(default=0, ge=0)
    overrides: list[str] = []
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="before")
    @classmethod
    def _with_mode(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and not raw.get("mode"):
            return {**raw, "mode": _way(str(raw.get("metric", "validation/loss")))}
        return raw

    @model_validator(mode="after")
    def _judged_on_validation(self) -> TuneRun:
        if not self.metric.startswith("validation/"):
            raise ValueError(
                f"metric = '{self.metric}': trials are compared on validation cells only; give a "
                "metric of theirs, e.g. 'validation/loss'"
            )
        way = _way(self.metric)
        if self.mode != way:
            raise ValueError(
                f"mode = '{self.mode}' would choose the worst trial by {self.metric}; leave mode "
                f"out, it is '{way}'"
            )
        if self.scheduler == "pbt" and self.algorithm == "optuna":
            raise ValueError(
                "scheduler = 'pbt' changes values while trials train, and cannot follow "
                "algorithm = 'optuna'; choose 'random' or 'grid', or scheduler = 'asha'"
            )
        return self


# job -> (section, "module:function" that executes it)
JOBS: Mapping[str, tuple[type[Run], str]] = {
    "ingest": (IngestRun, "cellray.data.ingest_job:run_ingest"),
    "synthesize": (SynthesizeRun, "cellray.ops.synthesize:run_synthesize"),
    "pretrain": (PretrainRun, "cellray.train.pretrain:pretrain"),
    "finetune": (FinetuneRun, "cellray.train.finetune:finetune"),
    "tune": (TuneRun, "cellray.tune.sweep:tune"),
    "embed": (EmbedRun, "cellray.infer.embed:embed"),
    "map": (MapRun, "cellray.infer.mapping:map_cells"),
    "benchmark": (BenchmarkRun, "cellray.bench.suite:benchmark"),
}


def _named(raw: dict[str, Any], key: str, name: str, default: str) -> str:
    """The unit a plugged section names, with the default filled in."""
    table = raw.setdefault(key, {})
    if not isinstance(table, dict):
        raise ConfigError(f"'{key}' is a section: write [{key}]")
    chosen = table.setdefault(name, default) if default else table.get(name)
    if not isinstance(chosen, str) or not chosen:
        raise ConfigError(f'[{key}] needs {name} = "..."')
    return chosen


def _plug_model(raw: dict[str, Any], *, objective: bool) -> dict[str, type[Section]]:
    unit = family(_named(raw, "model", "family", ""))
    tokenizer = _named(raw, "tokenizer", "name", unit.tokenizer)
    raw["model"], raw["tokenizer"] = with_preset(unit, raw["model"], raw["tokenizer"])
    types: dict[str, type[Section]] = {
        "model": unit.config,
        "tokenizer": registry.find("cellray.tokenizers", tokenizer, "TOKENIZER").config,
    }
    if objective:
        name = _named(raw, "objective", "name", unit.objective)
        types["objective"] = registry.find("cellray.objectives", name, "OBJECTIVE").config
    return types


def _plug_task(raw: dict[str, Any]) -> dict[str, type[Section]]:
    task = registry.find("cellray.tasks", _named(raw, "task", "name", ""), "TASK")
    return {"task": task.config}


def _plugs(job: str) -> Callable[[dict[str, Any]], dict[str, type[Section]]]:
    def ingest(raw: dict[str, Any]) -> dict[str, type[Section]]:
        return {"ingest": importlib.import_module("cellray.data.ingest").IngestConfig}

    def finetune(raw: dict[str, Any]) -> dict[str, type[Section]]:
        types = _plug_task(raw)
        return types | (_plug_model(raw, objective=False) if "model" in raw else {})

    chosen: dict[str, Callable[[dict[str, Any]], dict[str, type[Section]]]] = {
        "ingest": ingest,
        "pretrain": lambda raw: _plug_model(raw, objective=True),
        "finetune": finetune,
        "benchmark": lambda raw: plug_benchmark(raw, lambda table: _plug_task(table)["task"]),
    }
    return chosen.get(job, lambda raw: {})


def check_job(job: str) -> None:
    """Refuse a job name that does not exist."""
    if job not in JOBS:
        raise ConfigError(f"no job '{job}'.{did_you_mean(job, JOBS)} Allowed: {', '.join(JOBS)}")


def build_run(job: str, raw: Mapping[str, Any], *, source: str = "") -> Run:
    """Validate a run given as JSON-like tables.

    Raises:
        ConfigError: an unknown job or key, a wrong type, or a cross-field rule that does not hold.
    """
    check_job(job)
    if job == "finetune" and "train_backbone" in raw:
        prefix = f"{source}: " if source else ""
        raise ConfigError(
            f"{prefix}'train_backbone' is gone: which weights are trained is said by [adapt]; "
            'write adapt.mode = "probe" for the head alone (false), and nothing, or '
            'adapt.mode = "full", for the whole model (true)'
        )
    return build_section(JOBS[job][0], raw, plugs=_plugs(job), source=source)


def load_run(job: str, path: str | Path | None, overrides: Sequence[str] = ()) -> Run:
    """Read a run's TOML file and lay overrides over it; without a file, overrides alone.

    Raises:
        ConfigError: as in :func:`build_run`, or the file is missing or not TOML.
    """
    check_job(job)
    raw = read_toml(path) if path else {}
    return build_run(job, apply_overrides(raw, overrides), source=str(path or ""))


def job_of(run: Run) -> str:
    """The job a run belongs to."""
    return next(job for job, (cls, _) in JOBS.items() if isinstance(run, cls))


def run_job(run: Run, say: Say | None = None) -> Any:
    """Execute a run and return its result object.

    Args:
        run: from :func:`load_run` or :func:`build_run`.
        say: receives progress lines; silent by default.
    """
    module, _, function = JOBS[job_of(run)][1].partition(":")
    return getattr(importlib.import_module(module), function)(run, say or (lambda line: None))
