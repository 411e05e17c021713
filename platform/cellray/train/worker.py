"""What each Ray Train worker does: build, resume, stream, step, report."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import ray.train
import torch
from torch import nn

from cellray.core import registry
from cellray.core.batch import CellBatch
from cellray.core.draw import Draw
from cellray.core.errors import CheckpointError
from cellray.core.section import build_section
from cellray.data.collate import collate_tokens
from cellray.data.pipeline import token_stream
from cellray.data.tokens import make_tokenizer
from cellray.models.base import CellModel
from cellray.nn.performer import RedrawSchedule
from cellray.objectives.base import Objective
from cellray.train.checkpoint import (
    ENGINE_DIR,
    Manifest,
    model_of,
    read_manifest,
    write_checkpoint,
)
from cellray.train.config import (
    BatchSection,
    CheckpointSection,
    EngineSection,
    OptimSection,
    ScaleSection,
    TrainSection,
)
from cellray.train.engine import Engine, build_engine
from cellray.train.loop import Collator, Loop
from cellray.train.prepare import TrainingData
from cellray.train.telemetry import Telemetry

__all__ = ["TrainJob", "build_objective", "check_job", "fitting_weights", "train_worker"]


@dataclass(frozen=True)
class TrainJob:
    """All a worker needs; picklable.

    Attributes:
        name: the run's name.
        manifest: the checkpoint manifest of step 0.
        data: source, plan and validation cells.
        steps: last step of the run.
        weights: what a fresh run starts with (name -> tensor), None to start anew; they travel
            with the job, so that workers need not see the driver's disk.
        train_backbone: False trains the classifier alone.
        device: ``cpu`` or ``cuda``.
    """

    name: str
    manifest: Manifest
    data: TrainingData
    steps: int
    seed: int
    optim: OptimSection
    batch: BatchSection
    train: TrainSection
    engine: EngineSection
    scale: ScaleSection
    checkpoint: CheckpointSection
    weights: Mapping[str, torch.Tensor] | None = None
    train_backbone: bool = True
    device: str = "cpu"


def build_objective(config: Mapping[str, Any], vocab: Any) -> Objective:
    """Build the objective that ``config["name"]`` names."""
    unit = registry.find("cellray.objectives", config["name"], "OBJECTIVE")
    objective: Objective = unit.build(build_section(unit.config, config), vocab)
    return objective


def fitting_weights(
    model: CellModel, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The checkpoint's weights under the model's names; a head of another shape is left out.

    A classifier takes the weights of a bare backbone, and a backbone those of a classifier.

    Raises:
        CheckpointError: a weight of the backbone does not fit; ``model`` may be on ``meta``.
    """
    own = model.state_dict()
    renamed = {}
    for name, value in weights.items():
        bare = name.removeprefix("backbone.")
        renamed[next((n for n in (name, f"backbone.{name}", bare) if n in own), name)] = value
    fitting = {n: v for n, v in renamed.items() if n in own and own[n].shape == v.shape}
    wrong = [n for n in renamed if n not in fitting and not n.startswith("head.")]
    if wrong:
        here = tuple(own[wrong[0]].shape) if wrong[0] in own else "no such tensor"
        raise CheckpointError(
            f"the checkpoint of init_from does not fit the model: {len(wrong)} tensors differ, "
            f"e.g. {wrong[0]}: {tuple(renamed[wrong[0]].shape)} in the checkpoint, {here} in the "
            "model; give [model] and [tokenizer] as the checkpoint has them (cellray show)"
        )
    return fitting


def load_backbone(model: CellModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Start ``model`` from a checkpoint's weights."""
    model.load_state_dict({**model.state_dict(), **fitting_weights(model, weights)})
    for module in model.modules():
        if isinstance(module, RedrawSchedule):
            module.begin_run()


def check_job(job: TrainJob) -> None:
    """Build on the driver, without memory, what every worker will build.

    Raises:
        CellrayError: tokenizer, objective, model or starting weights do not fit each other.
    """
    vocab = job.data.source.vocab
    build_objective(job.manifest.objective, vocab)
    unit = registry.find("cellray.objectives", job.manifest.objective["name"], "OBJECTIVE")
    unit.check(build_section(unit.config, job.manifest.objective), job.manifest.tokenizer)
    make_tokenizer(job.manifest.tokenizer, vocab)
    with torch.device("meta"):
        model = model_of(job.manifest, vocab)
    if job.weights is not None:
        fitting_weights(model, job.weights)


def freeze_unreached(model: nn.Module, objective: Objective, batch: CellBatch) -> list[str]:
    """Freeze parameters that the loss does not reach (e.g. a pretraining decoder)."""
    objective.loss(model(batch), batch).total.backward()  # type: ignore[no-untyped-call]
    frozen = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None and parameter.requires_grad:
            parameter.requires_grad_(False)
            frozen.append(name)
        parameter.grad = None
    return frozen


class _Worker:
    """One rank of one training run."""

    def __init__(self, job: TrainJob) -> None:
        context = ray.train.get_context()
        self.job = job
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = torch.device("cpu")
        if job.device == "cuda":
            self.device = ray.train.torch.get_device()
        else:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares DeepSpeed its guess
            threads = job.scale.threads_per_worker
            share = (os.cpu_count() or 1) // context.get_local_world_size()
            torch.set_num_threads(threads or max(1, share))
        self.vocab = job.data.source.vocab
        self.objective = build_objective(job.manifest.objective, self.vocab)
        self.collator = Collator(
            self.objective,
            self.vocab.pad,
            job.batch.cells_micro,
            job.seed,
            packed=job.batch.packing == "packed",
        )
        self.validation, self.counted = self._validation()
        self.engine, self.first_step = self._engine()
        self.telemetry = Telemetry(job.name, self.rank, first_step=self.first_step)

    def _model(self) -> CellModel:
        job = self.job
        torch.manual_seed(job.seed)
        model = model_of(job.manifest, self.vocab)
        if job.weights is not None:
            load_backbone(model, job.weights)
        if job.manifest.classes:
            if not job.train_backbone:
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(name.startswith("head."))
            block = job.data.source.tokens(job.data.plan.joinids[: job.batch.cells_micro], epoch=0)
            codes = job.data.source.covariates(block.joinids)
            probe = collate_tokens(block, pad=self.vocab.pad, covariates=codes)
            freeze_unreached(model, self.objective, self.objective.corrupt(probe, Draw(0)))
        return model.to(self.device)

    def _engine(self) -> tuple[Engine, int]:
        job = self.job
        engine = build_engine(
            self._model(),
            self.objective,
            name=job.engine.name,
            zero_stage=job.engine.zero_stage,
            optim=job.optim,
            precision=job.train.precision,
            cells_micro=job.batch.cells_micro,
            accumulation=job.batch.cells_global // (job.batch.cells_micro * self.world),
        )
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return engine, 0
        with checkpoint.as_directory() as folder:
            manifest = read_manifest(folder)
            engine.load(Path(folder) / ENGINE_DIR)
        torch.manual_seed(job.seed + manifest.step)
        return engine, manifest.step

    def _validation(self) -> tuple[list[CellBatch], int]:
        """This rank's share of the validation cells, and how many of its batches count.

        The cells of all ranks together are the same for any number of workers. Every rank has the
        same number of batches: where it has no cell left for its last one, a cell that does not
        count fills it.
        """
        job = self.job
        joinids = job.data.validation
        wanted = min(len(joinids), job.train.eval_cells)
        if wanted == 0:
            return [], 0
        # evenly spread over the store's order, then dealt to ranks
        chosen = joinids[np.linspace(0, len(joinids) - 1, wanted).round().astype(np.int64)]
        batches = self._judged(chosen[self.rank :: self.world])
        own = len(batches)
        most = len(chosen[:: self.world])  # cells of rank 0, which has no fewer than any other
        micro = job.batch.cells_micro
        batches += self._judged(chosen[:1]) * (-(-most // micro) - own)
        return batches, own

    def _judged(self, joinids: npt.NDArray[np.int64]) -> list[CellBatch]:
        """Validation micro-batches of the given cells."""
        if not len(joinids):
            return []
        source = self.job.data.source
        tokenizer = make_tokenizer(source.tokenizer, self.vocab)
        block = source.tokens(joinids, epoch=0, tokenizer=tokenizer)
        return list(self.collator(block, source.covariates(joinids), epoch=0))

    def report(self, metrics: dict[str, float], save: bool) -> None:
        """Send metrics, and on saving steps a checkpoint, to the controller."""
        self.telemetry.observe(metrics)
        if not save:
            ray.train.report(metrics)
            return
        folder = Path(tempfile.mkdtemp(prefix="cellray-checkpoint-"))
        self._save(folder, metrics)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(str(folder)))
        shutil.rmtree(folder, ignore_errors=True)

    def _save(self, folder: Path, metrics: Mapping[str, float]) -> None:
        engine_dir = folder / ENGINE_DIR
        engine_dir.mkdir()
        self.engine.save(engine_dir)
        weights = self.engine.weights()
        if self.rank == 0:
            step = int(metrics["step"])
            cursor = asdict(self.job.data.plan.cursor(step))
            manifest = self.job.manifest.at(step, cursor, self.world, dict(metrics))
            write_checkpoint(folder, manifest, vocab=self.vocab, weights=weights)

    def run(self) -> None:
        """Train from the last checkpoint to the run's last step."""
        job = self.job
        loop = Loop(
            engine=self.engine,
            collator=self.collator,
            optim=job.optim,
            train=job.train,
            total_steps=job.steps,
            save_every_steps=job.checkpoint.every_steps,
            report=self.report,
            validation=self.validation,
            validation_counted=self.counted,
        )
        loop.run(self._stream())

    def _stream(self) -> Iterator[Any]:
        job = self.job
        return token_stream(
            job.data.source,
            job.data.plan,
            first_step=self.first_step,
            last_step=job.steps,
            rank=self.rank,
            world=self.world,
            actors=job.scale.tokenizer_actors,
            cpus_per_actor=job.scale.cpus_per_actor,
        )


def train_worker(config: dict[str, Any]) -> None:
    """The function Ray Train runs on every worker; ``config["job"]`` references a TrainJob."""
    _Worker(ray.get(config["job"])).run()
