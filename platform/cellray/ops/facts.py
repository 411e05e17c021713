"""What an estimate knows of a pretraining run's cells: looked up in the store, or told by the file.

With a ``[plan]`` section nothing is opened: a run on an atlas that does not exist yet, or that this
machine cannot reach, can be planned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from cellray.core import registry
from cellray.core.errors import ConfigError
from cellray.core.section import build_section, to_dict
from cellray.data.locate import local_path
from cellray.data.plan import default_lanes, rank_lanes
from cellray.data.schema import JOINID
from cellray.data.soma import Store
from cellray.data.tokens import tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.models.base import BuildContext, CellModel, build_model, family
from cellray.objectives.base import Load
from cellray.train.config import (
    BatchSection,
    CheckpointSection,
    EngineSection,
    ScaleSection,
    TrainSection,
)

if TYPE_CHECKING:
    from cellray.runs import PretrainRun
    from cellray.train.job import TrainJob

__all__ = ["RunFacts", "of_job", "of_section"]

I64 = npt.NDArray[np.int64]

# A stored count and its gene in the training layout, compressed: 1.56 and 1.62 bytes measured on
# synthetic atlases of 305 and 1,856 genes a cell.
BYTES_PER_COUNT = 1.6
_BYTES_PER_TOKEN = 4.0  # of a token cache: 2 of the id, 1 to 4 of the value


@dataclass(frozen=True)
class RunFacts:
    """A run, as an estimate sees it.

    Attributes:
        model: on the meta device.
        objective: key and settings of the objective.
        num_genes: of the vocabulary.
        train_cells: cells of an epoch.
        validation_cells: cells set apart.
        batches_per_epoch: global batches.
        steps: of the whole run.
        lengths: tokens of typical cells: all that are known, or the mean alone.
        longest: tokens of the longest cell.
        mean_genes: genes that a cell has counts of.
        bytes_per_cell: read from the store for a cell.
        cached_bytes: read for a cell from a token cache, 0 without one.
        share: number of workers -> cells of a step that the one with the most gets; refuses
            more workers than lanes.
        source: where the figures are from.
        notes: lines about the data for the reader.
        warnings: likewise.
    """

    model: CellModel
    objective: Mapping[str, Any]
    num_genes: int
    train_cells: int
    validation_cells: int
    batches_per_epoch: int
    steps: int
    lengths: I64
    longest: int
    mean_genes: float
    bytes_per_cell: float
    cached_bytes: float
    share: Callable[[int], int]
    source: str
    batch: BatchSection
    train: TrainSection
    engine: EngineSection
    scale: ScaleSection
    checkpoint: CheckpointSection
    notes: Sequence[str] = ()
    warnings: Sequence[str] = field(default_factory=list)

    def load(self, tokens: float) -> Load:
        """What the objective makes of a cell of so many tokens."""
        unit = registry.find("cellray.objectives", str(self.objective["name"]), "OBJECTIVE")
        config = build_section(unit.config, dict(self.objective))
        load: Load = unit.load(config, tokens, self.num_genes)
        return load

    @property
    def epochs(self) -> float:
        """Passes over the training cells."""
        return self.steps / self.batches_per_epoch

    @property
    def trained_cells(self) -> float:
        """Cells of all steps, those that come again counted again."""
        return float(self.steps) * self.batch.cells_global

    @property
    def mean_tokens(self) -> float:
        """Tokens of a cell."""
        return float(self.lengths.mean())

    @property
    def flops(self) -> float:
        """Operations of the whole run, forward and backward."""
        sample = self.lengths
        loads = self.load(self.mean_tokens)
        prompted = 0.0
        if loads.prompt_after is not None:
            prompted = max(self.steps - loads.prompt_after, 0) / self.steps
        targets = loads.targets * len(sample)
        counts = [
            self.model.training_flops(sample, targets, cell_prompt=prompt)
            for prompt in (False, True)
        ]
        per_cell = (counts[0] * (1 - prompted) + counts[1] * prompted) / len(sample)
        return per_cell * self.trained_cells


def of_job(job: TrainJob) -> RunFacts:
    """The facts of a prepared run, whose store is open."""
    from cellray.train.checkpoint import model_of

    plan, source = job.data.plan, job.data.source
    with torch.device("meta"):
        model = model_of(job.manifest, source.vocab)
    limit = int(job.manifest.tokenizer.get("max_tokens", 2048))
    longest = min(limit, source.vocab.num_tokens)
    mean = min(float(plan.mean_length or longest), float(longest))
    known = getattr(plan, "lengths", None)
    lengths = np.array([round(mean)]) if known is None else np.asarray(known)
    lengths = np.clip(lengths.astype(np.int64), 1, longest)
    counts, size = _stored(job)
    return RunFacts(
        model=model,
        objective=job.manifest.objective,
        num_genes=len(source.vocab),
        train_cells=len(plan.joinids),
        validation_cells=len(job.data.validation),
        batches_per_epoch=plan.batches_per_epoch,
        steps=job.steps,
        lengths=lengths,
        longest=int(lengths.max()) if known is not None else longest,
        mean_genes=counts or mean,
        bytes_per_cell=size or (counts or mean) * BYTES_PER_COUNT,
        cached_bytes=mean * _BYTES_PER_TOKEN if job.data.cache else 0.0,
        share=lambda workers: plan.share(0, workers),
        source=f"store {source.store.uri}",
        batch=job.batch,
        train=job.train,
        engine=job.engine,
        scale=job.scale,
        checkpoint=job.checkpoint,
        notes=[
            f"batches: {plan.batches_per_epoch} global batches of {plan.cells_global} an epoch, "
            f"remainder {plan.remainder_cells}",
            *(f"shuffle: {line}" for line in job.data.mixing),
            *([f"long cells: {job.data.cut}"] if job.data.cut else []),
        ],
        warnings=job.data.warnings,
    )


def _stored(job: TrainJob) -> tuple[float, float]:
    """Mean counts of a training cell, and bytes of X a cell; 0 where the store does not say."""
    store, ids = job.data.source.store, job.data.plan.joinids
    counts = size = 0.0
    if store.has_obs("nnz"):
        obs = store.obs(["nnz"])
        counts = float(obs["nnz"][obs[JOINID].isin(ids)].mean())
    path = local_path(store.uri) if isinstance(store, Store) else None
    if path is not None:
        x = path / "ms" / store.measurement / "X" / store.layer
        files = sum(f.stat().st_size for f in x.rglob("*") if f.is_file())
        size = files / max(store.num_cells, 1)
    return counts, size


def of_section(run: PretrainRun) -> RunFacts:
    """The facts of a run whose ``[plan]`` section tells them; opens nothing."""
    section, batch = run.plan, run.batch
    assert section is not None, "the caller has looked"
    held = round(section.cells * run.data.split.validation_fraction)
    train_cells = section.cells - held
    if train_cells < batch.cells_global:
        raise ConfigError(
            f"plan.cells = {section.cells} leaves {train_cells} cells to train on, fewer than "
            f"batch.cells_global = {batch.cells_global}; give the cells of the whole selection"
        )
    lanes = run.data.lanes or default_lanes(batch.cells_global)
    per_epoch = train_cells // batch.cells_global
    steps = run.train.steps or max(1, round(run.train.epochs * per_epoch))
    tokenizer = to_dict(run.tokenizer)
    longest = int(tokenizer.get("max_tokens", 2048))
    genes = section.mean_genes or section.mean_tokens
    mean = min(section.mean_tokens, float(longest))
    return RunFacts(
        model=_model(run, section.genes),
        objective=to_dict(run.objective),
        num_genes=section.genes,
        train_cells=train_cells,
        validation_cells=held,
        batches_per_epoch=per_epoch,
        steps=steps,
        lengths=np.array([max(round(mean), 1)]),
        longest=min(longest, section.genes + len(tokenizer_unit(tokenizer["name"]).specials)),
        mean_genes=genes,
        bytes_per_cell=genes * BYTES_PER_COUNT,
        cached_bytes=mean * _BYTES_PER_TOKEN if run.data.cache else 0.0,
        share=lambda workers: len(rank_lanes(lanes, 0, workers)) * (batch.cells_global // lanes),
        source="section [plan] of the file; the store was not opened",
        batch=batch,
        train=run.train,
        engine=run.engine,
        scale=run.scale,
        checkpoint=run.checkpoint,
    )


def _model(run: PretrainRun, num_genes: int) -> CellModel:
    tokenizer = to_dict(run.tokenizer)
    unit = family(to_dict(run.model)["family"])
    ids = [f"gene{i}" for i in range(num_genes)]
    specials = tokenizer_unit(tokenizer["name"]).specials
    vocab = unit.prepare(run.model, Vocab.from_genes(ids, [""] * num_genes, specials=specials))
    context = BuildContext(
        vocab,
        covariates=dict.fromkeys(run.data.covariates, 1),  # categories: a row of a table each
        max_tokens=int(tokenizer.get("max_tokens", 2048)),
        tokenizer=tokenizer,
    )
    with torch.device("meta"):
        return build_model(unit.name, run.model, context)  # type: ignore[arg-type]
