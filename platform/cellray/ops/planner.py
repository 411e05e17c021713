"""What a run will take: steps, hours, cost, memory by ZeRO stage, disk and reads, beforehand.

The formulae:
    operations  of real tokens, forward and backward, as the model counts them (cellray.nn.flops)
    hours       operations / (peak x utilisation x workers), or cells / (measured rate x workers);
                where workers share a step unevenly, all wait for the largest share
    memory      cellray.ops.memory and cellray.nn.activations, for the largest micro-batch: as many
                cells as ``batch`` allows, all as long as the longest
    disk        12 bytes a parameter a checkpoint: float32 weights and two moments; ``keep_last``
                checkpoints, the best one, and 4 bytes a parameter of the exported model
    reads       every cell of every step from the store, or once to fill a token cache
    tokenising  10,000 cells of 1,845 genes a second and core, in proportion to genes
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from cellray.core.errors import ConfigError
from cellray.nn.activations import Activations, Work
from cellray.ops.facts import RunFacts, of_job, of_section
from cellray.ops.hardware import PRESETS, Hardware, hardware_of, peak_flops
from cellray.ops.memory import USABLE, States, model_states, peak_memory
from cellray.train.rules import uneven_shares

if TYPE_CHECKING:
    from cellray.runs import FinetuneRun, PretrainRun, Run

__all__ = ["Plan", "PlanOptions", "estimate", "plan_lines", "plan_of"]

_TOKENISED = 10_000.0 * 1_845  # genes a second and core (README, "Speed")
_DEFAULT_MFU = 0.3
_SHORT_STEP_S = 0.1


@dataclass(frozen=True)
class PlanOptions:
    """What the command line, or the ``[plan]`` section, says about the machine.

    Attributes:
        hardware: preset or NAME:TFLOPS:GB; "" takes this machine's, or an A100.
        workers: number of workers; 0 takes ``scale.workers``.
        cells_per_second: measured, per worker; 0 counts operations.
        mfu: assumed share of the peak.
        price: per GPU-hour; 0 gives no cost.
    """

    hardware: str = ""
    workers: int = 0
    cells_per_second: float = 0.0
    mfu: float = 0.0
    price: float = 0.0


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a worker under one engine.

    Attributes:
        name: engine, stage and offloading, in words.
        peak: as configured.
        recomputed: with activation checkpointing.
        host: in the host's memory, for each worker.
        chosen: whether the run is configured so.
    """

    name: str
    peak: float
    recomputed: float
    host: float
    chosen: bool


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        facts: what the estimate knows of the run.
        hardware: what it runs on.
        workers: how many.
        flops: of the whole run.
        rate: cells a second of one worker.
        basis: what the rate rests on, in words.
        assumed: share of the peak that is assumed, 0 if none is.
        hours: of the wall clock.
        price: per worker-hour, 0 if unknown.
        stages: memory by engine.
        activations: of the largest micro-batch.
        micro_cells: its cells.
        num_parameters: of the model.
    """

    facts: RunFacts
    hardware: Hardware
    workers: int
    flops: float
    rate: float
    basis: str
    assumed: float
    hours: float
    price: float
    stages: tuple[StageMemory, ...]
    activations: Activations
    micro_cells: int
    num_parameters: int
    num_embedding: int

    @property
    def worker_hours(self) -> float:
        """GPU-hours on GPUs."""
        return self.hours * self.workers

    @property
    def checkpoint_bytes(self) -> float:
        """One checkpoint on disk: float32 weights and both moments."""
        return 12.0 * self.num_parameters

    @property
    def kept_bytes(self) -> float:
        """All that stays on disk at the end: checkpoints, the best one, the exported model."""
        section, steps = self.facts.checkpoint, self.facts.steps
        saves = 1 + (max(steps - 1, 0) // section.every_steps if section.every_steps else 0)
        best = 1 if self.facts.train.eval_every_steps else 0
        kept = min(saves, section.keep_last + best)
        return kept * self.checkpoint_bytes + 4.0 * self.num_parameters

    @property
    def read_bytes(self) -> float:
        """From the store, and from the token cache, in all."""
        facts = self.facts
        if not facts.cached_bytes:
            return facts.trained_cells * facts.bytes_per_cell
        cells = facts.train_cells + facts.validation_cells
        return cells * facts.bytes_per_cell + facts.trained_cells * facts.cached_bytes

    @property
    def total_rate(self) -> float:
        """Cells a second of all workers."""
        return self.facts.trained_cells / (self.hours * 3600)

    @property
    def tokenising_cores(self) -> float:
        """Cores that keep up with all workers."""
        return self.total_rate * max(self.facts.mean_genes, 1.0) / _TOKENISED

    @property
    def chosen(self) -> StageMemory:
        """Memory as the run is configured."""
        return next(stage for stage in self.stages if stage.chosen)

    def fits(self, num_bytes: float) -> bool | None:
        """Whether it fits the card; None where there is none."""
        room = self.hardware.memory
        return None if not room else num_bytes <= USABLE * room


def _hardware(options: PlanOptions, facts: RunFacts) -> tuple[Hardware, str]:
    """The hardware, and why."""
    if options.hardware:
        return hardware_of(options.hardware), ""
    if not facts.scale.gpus_per_worker:
        return PRESETS["cpu"], ""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        memory = float(torch.cuda.get_device_properties(0).total_memory)
        bf16, fp32 = peak_flops(name, "bf16"), peak_flops(name, "fp32")
        if fp32 is not None:
            return Hardware(name, bf16, fp32, memory), " (this machine's)"
    return PRESETS["a100"], " (assumed; say which with --hardware)"


def _rate(facts: RunFacts, hardware: Hardware, options: PlanOptions) -> tuple[float, str, float]:
    """Cells a second of a worker, what that rests on, and the share of the peak assumed.

    Raises:
        ConfigError: nothing says how fast the hardware is.
    """
    if options.cells_per_second:
        return options.cells_per_second, "as measured", 0.0
    per_cell = facts.flops / facts.trained_cells
    if not per_cell:
        raise ConfigError(
            "the model counts no operations (CellModel.training_flops), so its speed cannot be "
            "planned; measure it and give --cells-per-second"
        )
    precision = facts.train.precision
    if not hardware.is_gpu:
        return hardware.fp32 / per_cell, f"{hardware.fp32 / 1e9:.0f} GFLOP/s a worker, assumed", 0.0
    peak = hardware.peak(precision)
    if peak is None:
        raise ConfigError(
            f"{hardware.name} has no {precision} peak; set train.precision = 'fp32', or give a "
            "measured --cells-per-second"
        )
    mfu = options.mfu or _DEFAULT_MFU
    basis = f"{100 * mfu:.0f} % of {peak / 1e12:.0f} TFLOP/s {precision}, assumed"
    return peak * mfu / per_cell, basis, mfu


def _work(facts: RunFacts, hardware: Hardware) -> Work:
    """The largest micro-batch."""
    batch, longest = facts.batch, facts.longest
    cells = min(batch.cells_micro, facts.share(facts.scale.workers))
    limit = getattr(batch, "tokens_micro", 0)
    if isinstance(limit, int) and limit:
        cells = max(1, min(cells, limit // longest))
    load = facts.load(float(longest))
    bf16 = facts.train.precision == "bf16"
    packed = batch.packing == "packed"
    return Work(
        lengths=np.full(cells, longest, dtype=np.int64),
        packed=packed,
        targets=load.targets * cells,
        hidden=load.hidden * cells,
        added=load.added * cells,
        cell_prompt=load.prompt_after is not None and facts.steps > load.prompt_after,
        bf16=bf16,
        bf16_weights=bf16 and facts.engine.name == "deepspeed" and facts.engine.zero_stage > 0,
        on_gpu=hardware.is_gpu,
        varlen=packed and bf16 and hardware.is_gpu,
        checkpointing=bool(getattr(facts.train, "activation_checkpointing", False)),
    )


# (engine, stage, offload) of the table's rows.
_ENGINES = (
    ("torch", 0, "none"),
    ("deepspeed", 0, "none"),
    ("deepspeed", 1, "none"),
    ("deepspeed", 2, "none"),
    ("deepspeed", 3, "none"),
    ("deepspeed", 2, "optimizer"),
    ("deepspeed", 3, "parameters"),
)


def _stages(facts: RunFacts, work: Work, workers: int, trained: int) -> tuple[StageMemory, ...]:
    engine = facts.engine
    ours = (engine.name, engine.zero_stage, getattr(engine, "offload", "none"))
    rows = _ENGINES if ours in _ENGINES else (*_ENGINES, ours)
    passes = math.ceil(facts.share(workers) / max(work.cells, 1))
    stages = []
    for name, stage, offload in rows:
        plain = replace(work, bf16_weights=work.bf16 and name == "deepspeed" and stage > 0)
        states = model_states(
            trained,
            engine=name,
            stage=stage,
            workers=workers,
            bf16=work.bf16,
            offload=offload,
            on_gpu=work.on_gpu,
        )
        peak, recomputed = (
            _peak(facts, states, replace(plain, checkpointing=flag), passes)
            for flag in (work.checkpointing, True)
        )
        words = "torch" if name == "torch" else f"ZeRO {stage}"
        if offload != "none":
            words += f", {offload} on the host"
        chosen = (name, stage, offload) == ours
        stages.append(StageMemory(words, peak, recomputed, states.host, chosen))
    return tuple(stages)


def _peak(facts: RunFacts, states: States, work: Work, passes: int) -> float:
    return peak_memory(states, facts.model.activations(work), passes=passes)


def plan_of(facts: RunFacts, options: PlanOptions) -> Plan:
    """What a run will take.

    Raises:
        ConfigError: unknown hardware, or nothing says how fast it is.
    """
    hardware, why = _hardware(options, facts)
    workers = options.workers or facts.scale.workers
    facts = replace(facts, scale=facts.scale.model_copy(update={"workers": workers}))
    rate, basis, assumed = _rate(facts, hardware, options)
    work = _work(facts, hardware)
    trained = sum(p.numel() for p in facts.model.parameters() if p.requires_grad)
    tables = {
        id(m.weight): m.weight.numel()
        for m in facts.model.modules()
        if isinstance(m, torch.nn.Embedding)
    }
    return Plan(
        facts=facts,
        hardware=replace(hardware, name=hardware.name + why),
        workers=workers,
        flops=facts.flops,
        rate=rate,
        basis=basis,
        assumed=assumed,
        hours=facts.steps * facts.share(workers) / rate / 3600,  # all wait for the largest share
        price=options.price,
        stages=_stages(facts, work, workers, trained),
        activations=facts.model.activations(work),
        micro_cells=work.cells,
        num_parameters=sum(p.numel() for p in facts.model.parameters()),
        num_embedding=sum(tables.values()),
    )


def _size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def _hours(hours: float) -> str:
    return f"{hours * 60:.2g} minutes" if hours < 1 else f"{hours:,.1f} hours"


def plan_lines(plan: Plan) -> list[str]:
    """The plan as lines to print."""
    facts, gpu = plan.facts, plan.hardware.is_gpu
    unit = "GPU" if gpu else "worker"
    lines = [
        f"figures: {facts.source}",
        f"cells: {facts.train_cells:,} to train on, {facts.validation_cells:,} to validate on; "
        f"{facts.mean_tokens:,.0f} tokens on average, {facts.longest:,} at most",
        *facts.notes,
        f"steps: {facts.steps:,} of {facts.batch.cells_global:,} cells "
        f"({facts.epochs:.2f} epochs, {facts.trained_cells:,.0f} cells)",
        f"model: {plan.num_parameters:,} parameters ({plan.num_embedding:,} in tables), "
        f"vocabulary of {facts.num_genes:,} genes; {plan.flops:.3g} FLOP",
        f"hardware: {plan.workers} x {plan.hardware.name}",
        f"rate: {plan.rate:,.1f} cells/s a worker, {plan.total_rate:,.1f} in all ({plan.basis})",
        f"time: {_hours(plan.hours)} on {plan.workers} workers, "
        f"{plan.worker_hours:,.3g} {unit}-hours",
    ]
    if plan.price:
        lines.append(f"cost: {plan.worker_hours * plan.price:,.0f} at {plan.price:g} a {unit}-hour")
    lines += _memory_lines(plan)
    seconds = max(plan.hours * 3600, 1e-9)
    lines += [
        f"disk: {_size(plan.checkpoint_bytes)} a checkpoint, {_size(plan.kept_bytes)} kept in all",
        f"reads: {_size(plan.read_bytes)} in all, {plan.read_bytes / seconds / 1e6:,.3g} MB/s"
        + (", most of it from the token cache" if facts.cached_bytes else " from the store"),
    ]
    if not facts.cached_bytes:
        cores = max(math.ceil(plan.tokenising_cores), 1)
        lines.append(
            f"tokenising: {cores} CPU core{'s keep' if cores > 1 else ' keeps'} up, of all machines"
        )
    warnings = [*facts.warnings, *_doubts(plan)]
    return lines + [f"warning: {warning}" for warning in warnings]


def _doubts(plan: Plan) -> list[str]:
    """What speaks against the speed."""
    facts = plan.facts
    uneven = uneven_shares(
        facts.share(plan.workers), workers=plan.workers, cells_global=facts.batch.cells_global
    )
    found = [uneven] if uneven else []
    step_s = plan.hours * 3600 / facts.steps
    if not plan.assumed or step_s >= _SHORT_STEP_S:
        return found
    tenth = plan.hours * plan.assumed / 0.05
    return [
        *found,
        f"a step would take {1000 * step_s:.2g} ms: with so little work, kernel launches and the "
        f"exchange of gradients set the pace; at 5 % of the peak the run takes {_hours(tenth)}. "
        "Measure some steps and give --cells-per-second, or raise batch.cells_global",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    what = "cell" if plan.micro_cells == 1 else "cells"
    lines = [
        f"memory of a worker, micro-batch of {plan.micro_cells} {what} of {plan.facts.longest:,} "
        f"tokens ({_size(plan.activations.total)} of activations):"
    ]
    for stage in plan.stages:
        fits = {None: "", True: "  fits", False: "  does not fit"}[plan.fits(stage.peak)]
        host = f", {_size(stage.host)} on the host" if stage.host else ""
        mark = "  <- this run" if stage.chosen else ""
        lines.append(
            f"  {stage.name + ':':<31} {_size(stage.peak):>8}{fits}; with activation "
            f"checkpointing {_size(stage.recomputed)}{host}{mark}"
        )
    return lines


def facts_of(run: PretrainRun | FinetuneRun, *, check: bool = False) -> RunFacts:
    """What an estimate knows of a training run; opens the store unless the file tells all.

    Args:
        run: a training run.
        check: refuse what could not be started here and now: open the store whatever the file
            tells, and want the GPUs that the run reserves.

    Raises:
        CellrayError: what does not fit the data.
    """
    from cellray import runs

    scale = run.scale
    if not check:  # a machine without GPUs can plan for them
        scale = run.scale.model_copy(update={"gpus_per_worker": 0.0})
    if isinstance(run, runs.PretrainRun):
        if run.plan is not None and not check:
            return of_section(run)
        from cellray.train.pretrain import prepare_pretrain

        job = prepare_pretrain(run.model_copy(update={"scale": scale})).job
    else:
        from cellray.train.finetune import prepare_finetune

        job = prepare_finetune(run.model_copy(update={"scale": scale})).job
    return replace(of_job(job), scale=run.scale)


def options_of(run: Run, given: PlanOptions) -> PlanOptions:
    """What the command line says, and where it says nothing the run's ``[plan]`` section."""
    section = getattr(run, "plan", None)
    if section is None:
        return given
    return PlanOptions(
        hardware=given.hardware or section.hardware,
        workers=given.workers,
        cells_per_second=given.cells_per_second or section.cells_per_second,
        mfu=given.mfu or section.mfu,
        price=given.price or section.price_per_gpu_hour,
    )


def estimate(run: Run, options: PlanOptions | None = None) -> list[str]:
    """The estimate of any run, as lines to print; starts nothing.

    Args:
        run: any run.
        options: those of ``cellray plan``, which opens no store where a pretraining run's
            ``[plan]`` section tells what is in it; None checks the run as well.

    Raises:
        CellrayError: what does not fit the data.
    """
    from cellray import runs

    if isinstance(run, runs.PretrainRun | runs.FinetuneRun | runs.TuneRun):
        from cellray.train.tracking import check_tracking, tracking_uri

        if run.tracking.enabled and options is None:
            check_tracking(tracking_uri(run.tracking, run.checkpoint.dir), make=False)
    if isinstance(run, runs.PretrainRun | runs.FinetuneRun):
        facts = facts_of(run, check=options is None)
        return plan_lines(plan_of(facts, options_of(run, options or PlanOptions())))
    if isinstance(run, runs.IngestRun):
        from cellray.data.ingest_job import check_ingest

        return check_ingest(run)
    if isinstance(run, runs.SynthesizeRun):
        from cellray.ops.synthesize import check_synthesize

        return check_synthesize(run)
    if isinstance(run, runs.BenchmarkRun):
        from cellray.bench.suite import check_benchmark

        return check_benchmark(run)
    if isinstance(run, runs.TuneRun):
        from cellray.tune.sweep import check_sweep

        return check_sweep(run)
    if isinstance(run, runs.MapRun):
        from cellray.infer.mapping import check_map

        return check_map(run)
    assert isinstance(run, runs.EmbedRun)
    from cellray.infer.embed import check_embed

    return check_embed(run)
