"""Small classifiers of any family, with cells that their own tokenizer has prepared."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from cellray.core.batch import CellBatch
from cellray.core.draw import Draw
from cellray.core.section import build_section
from cellray.data.tokens import make_tokenizer, tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.models.base import BuildContext, CellModel, build_model, family
from cellray.objectives.base import Objective
from cellray.testing import random_block
from cellray.train.adapt import Adapted, adapt_model
from cellray.train.checkpoint import write_tensors
from cellray.train.config import AdaptSection, OptimSection
from cellray.train.engine import build_engine, world_size
from cellray.train.job import build_objective
from cellray.train.microbatch import Collator
from cellray.train.shards import optimizer_file
from helpers_training import SIZES

CLASSES, GENES, CELLS = 3, 50, 8


@dataclass(frozen=True)
class Ready:
    """What :func:`classifier` makes."""

    model: CellModel
    objective: Objective
    batch: CellBatch


def classifier(name: str, **sizes: Any) -> Ready:
    """A family's classifier of three classes, freshly drawn, and eight labelled cells."""
    unit = family(name)
    ids = [f"ENSG{i:011d}" for i in range(GENES)]
    vocab = Vocab.from_genes(ids, [""] * GENES, specials=tokenizer_unit(unit.tokenizer).specials)
    vocab = vocab.with_medians(np.linspace(0.5, 3, GENES).astype(np.float32))
    known = {k: v for k, v in (SIZES | sizes).items() if k in unit.config.model_fields}
    config = build_section(unit.config, {"family": name, **known})
    vocab = unit.prepare(config, vocab)
    torch.manual_seed(0)
    model = build_model(name, config, BuildContext(vocab, max_tokens=24), num_classes=CLASSES)
    objective = build_objective({"name": "classification"}, vocab)
    block = random_block(CELLS, num_genes=GENES, genes_per_cell=20, seed=1)
    tokens = make_tokenizer({"name": unit.tokenizer, "max_tokens": 24}, vocab)(block, Draw(5))
    collate = Collator(objective, vocab.pad, CELLS, seed=5)
    (batch,) = collate(tokens, {"label": block.joinids % CLASSES}, epoch=0)
    return Ready(model, objective, batch)


def logits_of(model: torch.nn.Module, batch: CellBatch) -> torch.Tensor:
    """Class logits in eval mode; the model is left in the mode it was in."""
    before = model.training
    model.eval()
    with torch.no_grad():
        found = model(batch).predictions["class_logits"].float().clone()
    model.train(before)
    return found


def adapted(ready: Ready, **keys: Any) -> Adapted:
    """Adapt a classifier by the keys of ``[adapt]``."""
    return adapt_model(ready.model, AdaptSection(**keys), ready.objective, ready.batch, seed=3)


@dataclass(frozen=True)
class Outcome:
    """What :func:`trained_part` found.

    Attributes:
        losses: of each step.
        weights: the whole module's after them.
        parts: of an evaluation in which the last rank's last cell does not count.
    """

    losses: list[float]
    weights: dict[str, np.ndarray]
    parts: dict[str, float]


def trained_part(
    name: str, engine: str, stage: int, keys: dict[str, Any], steps: int = 4
) -> Outcome:
    """A few steps with ``[adapt]``; each rank takes its share of the cells."""
    ready = classifier(name)
    adapted(ready, **keys)
    optim = OptimSection(lr=3e-3, clip_norm=0.5, weight_decay=0.1)
    made = build_engine(
        ready.model, ready.objective, name=engine, zero_stage=stage, optim=optim, precision="fp32"
    )
    world = world_size()
    rank = torch.distributed.get_rank() if world > 1 else 0
    share = CELLS // world
    first = rank * share
    mine = rows_of(ready.batch, slice(first, first + share))
    losses = [made.step([mine], lr=3e-3).loss for _ in range(steps)]
    judged = [rows_of(ready.batch, slice(first, first + share - 1))]
    judged.append(rows_of(ready.batch, slice(first + share - 1, first + share)))
    stats = made.evaluate(judged, counted=1 if rank == world - 1 else 2)
    weights = {key: value.numpy() for key, value in made.weights().items()}
    return Outcome(losses, weights, {**stats.parts, "loss": stats.loss})


def halves(
    name: str, first: tuple[str, int], second: tuple[str, int], keys: dict[str, Any], folder: str
) -> dict[str, np.ndarray]:
    """Weights after two steps under one engine, and two more under another from what it saved."""
    world = world_size()
    rank = torch.distributed.get_rank() if world > 1 else 0
    share = CELLS // world
    optim = OptimSection(lr=3e-3, clip_norm=0.5, weight_decay=0.1)
    place, made = Path(folder), None
    for number, (engine, stage) in enumerate((first, second)):
        ready = classifier(name)
        adapted(ready, **keys)
        if number:
            ready.model.load_state_dict(load_file(place / "weights.safetensors"))
        made = build_engine(
            ready.model,
            ready.objective,
            name=engine,
            zero_stage=stage,
            optim=optim,
            precision="fp32",
        )
        if number:
            made.load(place)
        mine = rows_of(ready.batch, slice(rank * share, (rank + 1) * share))
        for _ in range(2):
            made.step([mine], lr=3e-3)
        if not number:
            saved = made.snapshot()
            write_tensors(place / optimizer_file(rank, world), saved.optimizer)
            if rank == 0:
                write_tensors(place / "weights.safetensors", saved.weights)
            if world > 1:
                torch.distributed.barrier()
    assert made is not None
    return {key: value.numpy() for key, value in made.weights().items()}


def every_part(
    cases: dict[str, tuple[Any, ...]], halved: dict[str, tuple[Any, ...]]
) -> tuple[dict[str, Outcome], dict[str, dict[str, np.ndarray]]]:
    """Many cases of :func:`trained_part` and :func:`halves` in one group of processes."""
    return (
        {name: trained_part(*arguments) for name, arguments in cases.items()},
        {name: halves(*arguments) for name, arguments in halved.items()},
    )


def rows_of(batch: CellBatch, rows: slice) -> CellBatch:
    """Some cells of a padded batch."""
    cut = {
        f.name: value[rows]
        for f in fields(batch)
        if isinstance(value := getattr(batch, f.name), torch.Tensor) and len(value) == CELLS
    }
    codes = {name: code[rows] for name, code in batch.covariates.items()}
    return replace(batch, covariates=codes, **cut)
