"""What each Ray Train worker does: build, resume, stream, step, report."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import CheckpointUploadMode

from cellray.core.batch import CellBatch
from cellray.core.draw import Draw
from cellray.core.errors import StoppedError
from cellray.data.collate import collate_tokens
from cellray.data.pipeline import token_stream
from cellray.data.tokens import make_tokenizer
from cellray.models.base import CellModel
from cellray.nn.recompute import compile_blocks, recompute_blocks
from cellray.ops.hardware import peak_flops
from cellray.train.adapt import PARAMETERS_FILE, adapt_model
from cellray.train.cell_log import CellLog
from cellray.train.checkpoint import ENGINE_DIR, Manifest, model_of, read_manifest, read_weights
from cellray.train.engine import Engine, StepStats, build_engine
from cellray.train.guard import LossGuard, write_bad_step
from cellray.train.job import TrainJob, build_objective, load_backbone
from cellray.train.loop import Host, Loop, StepInput
from cellray.train.meter import WorkCounter
from cellray.train.microbatch import Collator
from cellray.train.profiling import StepProfiler
from cellray.train.rundir import RunDirectory
from cellray.train.saving import Saver, newest_whole, remove_uncommitted
from cellray.train.sizing import tokens_that_fit
from cellray.train.telemetry import Telemetry

__all__ = ["train_worker"]

_LOG = logging.getLogger(__name__)


def probe_cells(job: TrainJob, pad: int) -> CellBatch:
    """The first cells, with every category of every covariate: each may have its own weights."""
    source, levels = job.data.source, job.manifest.covariates
    block = source.tokens(job.data.plan.joinids[: job.batch.cells_micro], epoch=0)
    rows = np.arange(max([len(block), *(2 * len(names) for names in levels.values())]))
    cells = rows % len(block)
    codes = {name: found[cells] for name, found in source.covariates(block.joinids).items()}
    codes |= {name: rows % len(names) for name, names in levels.items()}
    return collate_tokens(block.take(cells), pad=pad, covariates=codes)


def _shared(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class _Worker(Host):
    """One rank of one training run."""

    def __init__(self, job: TrainJob) -> None:
        context = ray.train.get_context()
        self.job, self.seed = job, job.seed
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = torch.device("cpu")
        local = context.get_local_world_size()
        if job.device == "cuda":
            self.device = ray.train.torch.get_device()
            torch.cuda.set_device(self.device)
        else:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares DeepSpeed its guess
            share = (os.cpu_count() or 1) // local
            torch.set_num_threads(job.scale.threads_per_worker or max(1, share))
        self.vocab = job.data.source.vocab
        self.objective = build_objective(job.manifest.objective, self.vocab)
        self.session = float(_shared(time.time()))
        self.before, folder = self._resumed()
        self.first_step = self.before.step if self.before else 0
        model = self._model(folder)
        self.collator = self._collator(model, local)
        self.counter = self._counter(model)
        self.validation, self.counted = self._validation()
        self.engine = self._engine(model, folder)
        self.telemetry = Telemetry(job.name, self.rank, first_step=self.first_step)
        self.saver = Saver(
            job.run_dir,
            rank=self.rank,
            vocab=self.vocab,
            session=f"{int(self.session * 1000):x}",
            commit=self._commit,
        )
        self.guard = LossGuard(
            job.train.bad_steps,
            factor=job.train.explosion_factor,
            most=job.train.max_bad_steps,
            state=self.before.loop if self.before else None,
        )
        self.cells = None
        if job.train.log_cells:
            self.cells = CellLog(
                job.run_dir, rank=self.rank, world=self.world, session=self.session
            )
        self.profiler = StepProfiler(
            job.train.profile_steps if self.rank == 0 else [], Path(job.run_dir) / "profile"
        )

    def _resumed(self) -> tuple[Manifest | None, Path | None]:
        """The newest whole checkpoint; rank 0 looks, all take the same."""
        found = ""
        if self.rank == 0:
            remove_uncommitted(self.job.run_dir)
            folder, torn = newest_whole(self.job.run_dir)
            for text in torn:
                _LOG.warning("%s: %s; an earlier one is taken", self.job.name, text)
            found = str(folder or "")
        found = _shared(found)
        if not found:
            return None, None
        return read_manifest(found), Path(found)

    def _model(self, folder: Path | None) -> CellModel:
        job = self.job
        torch.manual_seed(job.seed)
        model = model_of(job.manifest, self.vocab)
        if job.weights is not None:
            load_backbone(model, job.weights)
        if job.manifest.classes or job.adapt.mode != "full":
            probe = self.objective.corrupt(probe_cells(job, self.vocab.pad), Draw(0))
            adapted = adapt_model(model, job.adapt, self.objective, probe, seed=job.seed)
            for name in adapted.unreached:
                _LOG.info("%s: the loss does not reach '%s': frozen", job.name, name)
            if self.rank == 0:
                RunDirectory.at(job.run_dir).write(PARAMETERS_FILE, adapted.counts)
        if folder is not None:
            model.load_state_dict(read_weights(folder))
        if job.train.compile:
            compile_blocks(model)
        if job.train.activation_checkpointing:
            recompute_blocks(model)
        return model.to(self.device)

    def _collator(self, model: CellModel, local: int) -> Collator:
        job = self.job
        collator = Collator(
            self.objective,
            self.vocab.pad,
            job.batch.cells_micro,
            job.seed,
            packed=job.batch.packing == "packed",
            fixed_length=model.fixed_length,
        )
        return tokens_that_fit(
            job, collator, model, rank=self.rank, world=self.world, local_workers=local
        )

    def _counter(self, model: CellModel) -> WorkCounter:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return WorkCounter(
            model,
            self.device,
            peak_flops=peak_flops(name, self.job.train.precision),
            workers=self.world,
            recomputed=self.job.train.activation_checkpointing,
        )

    def _engine(self, model: CellModel, folder: Path | None) -> Engine:
        job = self.job
        engine = build_engine(
            model,
            self.objective,
            name=job.engine.name,
            zero_stage=job.engine.zero_stage,
            optim=job.optim,
            precision=job.train.precision,
            offload=job.engine.offload,
        )
        if folder is not None:
            engine.load(folder / ENGINE_DIR)
        return engine

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
        every: list[Any] = [own]
        if self.world > 1:
            every = [None] * self.world
            dist.all_gather_object(every, own)
        batches += self._judged(chosen[:1]) * (max(every) - own)
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
        """Send metrics to the controller, and on saving steps write a checkpoint."""
        self.telemetry.observe(metrics)
        if not save:
            ray.train.report(metrics)
            return
        job, step = self.job, int(metrics["step"])
        last = step == job.steps
        if not last:
            ray.train.report(metrics)
        manifest = job.manifest.at(
            step,
            asdict(job.data.plan.cursor(step)),
            self.world,
            dict(metrics),
            random_state={"seed": job.seed, "drawn_by": "(seed, step, rank)", "step": step},
            loop={**self.guard.state(), "tokens_micro": self.collator.tokens_micro},
        )
        wait = last or not job.checkpoint.background
        noted = {**metrics, "reported": not last}
        self.saver.save(self.engine.snapshot, manifest, noted, wait=wait)

    def _commit(self, name: str, metrics: Mapping[str, float]) -> None:
        """Report a checkpoint that all ranks have written."""
        folder = Path(self.job.run_dir) / "checkpoints" / name
        ray.train.report(
            dict(metrics),
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    def vote(self) -> float:
        """See :class:`cellray.train.saving.Saver`."""
        return self.saver.vote()

    def settle(self, votes: float) -> None:
        """See :class:`cellray.train.saving.Saver`."""
        self.saver.settle(votes)

    def trained(
        self, tokens: StepInput, batches: Sequence[CellBatch], stats: StepStats, lr: float
    ) -> None:
        """Log cells, profile, and judge a bad step."""
        if self.cells is not None:
            self.cells.write(tokens.step, tokens.epoch, tokens.block.joinids, taken=stats.taken)
        self.profiler.step(tokens.step + 1)
        if stats.taken:
            return
        where = write_bad_step(
            self.job.run_dir,
            step=tokens.step,
            epoch=tokens.epoch,
            rank=self.rank,
            batches=batches,
            stats=stats,
            lr=lr,
        )
        try:
            self.guard.judge(tokens.step, stats, str(where))
        except StoppedError:  # on all ranks together
            self.saver.finish()
            raise

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
            host=self,
            guard=self.guard,
            counter=self.counter,
            validation=self.validation,
            validation_counted=self.counted,
        )
        self.profiler.step(self.first_step)
        try:
            loop.run(self._stream())
            self.saver.finish()
        finally:
            self.profiler.close()

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


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The function Ray Train runs on every worker; ``config["job"]`` references a TrainJob.

    Returns:
        ``{"stopped": text}`` where all ranks stopped together, for a reason that another try would
        not mend; else {}.
    """
    try:
        _Worker(ray.get(config["job"])).run()
    except StoppedError as error:
        return {"stopped": str(error)}
    return {}
