"""What a run will take: steps, hours, memory per worker and disk, before anything starts.

The formulae, all stated with the estimate:
    memory   float32 weights, gradients and AdamW's two moments are 16 bytes a parameter; a ZeRO
             stage divides moments (1), gradients (2) and weights (3) by the workers. bf16 adds
             2 bytes for the working copy. Activations are counted as 34 T D + 5 H T^2 values a
             layer and cell of the micro-batch (Korthikanti et al. 2022, arXiv:2205.05198); T is the
             length of a model's own sequence where it has one, and linear attention has no T^2.
    compute  6 x (parameters that are not embedding tables) per token, plus 12 T D per token and
             layer for attention, forward and backward together.
    hours    compute divided by an assumed rate, named in the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cellray.models.base import CellModel

if TYPE_CHECKING:
    from cellray.runs import Run
    from cellray.train.job import TrainJob

__all__ = ["Estimate", "count_parameters", "estimate", "estimate_training"]

# Sustained FLOP/s assumed for the hours, per worker: a CPU core doing float32 matrix products, and
# 30 % of an A100's 312 TFLOP/s dense bf16 peak.
_CPU_RATE = 2e10
_GPU_RATE = 0.3 * 312e12


@dataclass(frozen=True)
class Estimate:
    """What a training run will take.

    Attributes:
        num_parameters: all parameters.
        num_embedding: those in lookup tables.
        memory_bytes: per worker, weights to activations.
        checkpoint_bytes: one checkpoint on disk.
        flops: of the whole run.
        hours: at the assumed rate.
    """

    num_parameters: int
    num_embedding: int
    memory_bytes: float
    checkpoint_bytes: float
    flops: float
    hours: float


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters, and those of embedding tables; shared tensors count once."""
    total = sum(p.numel() for p in model.parameters())
    tables = {
        id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)
    }
    return total, sum(tables.values())


def estimate_training(
    model: CellModel,
    config: Mapping[str, Any],
    *,
    tokens_per_cell: float,
    longest: int,
    cells: float,
    cells_micro: int,
    workers: int,
    zero_stage: int,
    bf16: bool,
    on_gpu: bool,
) -> Estimate:
    """The estimate of a training run; see the module for the formulae.

    Args:
        model: the model, on any device (``meta`` will do).
        config: its configuration; ``num_layers``, ``width``, ``num_heads`` are read if there.
        tokens_per_cell: mean real tokens.
        longest: tokens of the longest cell.
        cells: cells trained on in the whole run.
        cells_micro: cells of a forward pass.
        workers: ranks.
        zero_stage: 0 to 3.
        bf16: whether a bf16 working copy is kept.
        on_gpu: which rate the hours assume.
    """
    layers, heads = int(config.get("num_layers", 0)), int(config.get("num_heads", 1))
    width = int(config.get("width", model.width))
    total, tables = count_parameters(model)
    per_parameter = (
        4 / (workers if zero_stage >= 3 else 1)
        + 4 / (workers if zero_stage >= 2 else 1)
        + 8 / (workers if zero_stage >= 1 else 1)
        + (2 if bf16 else 0)
    )
    square = 0 if model.linear_attention else 5 * heads * longest**2
    values = layers * (34 * longest * width + square) / 4
    activations = cells_micro * values * (2 if bf16 else 4)
    per_token = 6 * (total - tables) + 12 * layers * width * tokens_per_cell
    flops = per_token * tokens_per_cell * cells
    rate = (_GPU_RATE if on_gpu else _CPU_RATE) * workers
    return Estimate(
        total, tables, total * per_parameter + activations, total * 16.0, flops, flops / rate / 3600
    )


def _size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def _training_lines(job: TrainJob) -> list[str]:
    from cellray.train.checkpoint import model_of

    plan, source = job.data.plan, job.data.source
    with torch.device("meta"):
        model = model_of(job.manifest, source.vocab)
    longest = min(int(job.manifest.tokenizer.get("max_tokens", 2048)), source.vocab.num_tokens)
    longest = model.fixed_length or longest
    mean = float(model.fixed_length or plan.mean_length or longest)
    result = estimate_training(
        model,
        job.manifest.model,
        tokens_per_cell=min(mean, longest),
        longest=longest,
        cells=float(job.steps * plan.cells_global),
        cells_micro=job.batch.cells_micro,
        workers=job.scale.workers,
        zero_stage=job.engine.zero_stage if job.engine.name == "deepspeed" else 0,
        bf16=job.train.precision == "bf16",
        on_gpu=job.device == "cuda",
    )
    where = "30 % of an A100's bf16 peak" if job.device == "cuda" else "20 GFLOP/s a worker"
    saves = 1 + (job.steps // job.checkpoint.every_steps if job.checkpoint.every_steps else 0)
    kept = min(saves, job.checkpoint.keep_last + 1)
    accumulation = plan.cells_global // (job.batch.cells_micro * job.scale.workers)
    return [
        f"cells: {len(plan.joinids)} to train on, {len(job.data.validation)} to validate on; "
        f"{plan.batches_per_epoch} global batches of {plan.cells_global} an epoch, remainder "
        f"{plan.remainder_cells}",
        *(f"shuffle: {line}" for line in job.data.mixing),
        *([f"long cells: {job.data.cut}"] if job.data.cut else []),
        f"steps: {job.steps} ({job.steps / plan.batches_per_epoch:.2f} epochs), "
        f"{job.scale.workers} workers x {accumulation} micro-batches of {job.batch.cells_micro}",
        f"model: {result.num_parameters:,} parameters ({result.num_embedding:,} in tables), "
        f"vocabulary of {len(source.vocab):,} genes",
        f"memory: about {_size(result.memory_bytes)} per worker",
        f"disk: about {_size(result.checkpoint_bytes)} a checkpoint, "
        f"{_size(result.checkpoint_bytes * kept)} kept",
        f"hours: about {result.hours:.2g} at {where} ({result.flops:.2e} FLOP)",
        *[f"warning: {warning}" for warning in job.data.warnings],
    ]


def estimate(run: Run) -> list[str]:
    """The estimate of any run, as lines to print; opens the store, starts nothing.

    Raises:
        CellrayError: what does not fit the data.
    """
    from cellray import runs

    if isinstance(run, runs.PretrainRun | runs.FinetuneRun | runs.TuneRun):
        from cellray.train.tracking import check_tracking, tracking_uri

        if run.tracking.enabled:
            check_tracking(tracking_uri(run.tracking, run.checkpoint.dir), make=False)
    if isinstance(run, runs.PretrainRun):
        from cellray.train.pretrain import prepare_pretrain

        return _training_lines(prepare_pretrain(run).job)
    if isinstance(run, runs.FinetuneRun):
        from cellray.train.finetune import prepare_finetune

        return _training_lines(prepare_finetune(run).job)
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
    assert isinstance(run, runs.EmbedRun)
    from cellray.infer.embed import check_embed

    return check_embed(run)
