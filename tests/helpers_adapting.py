"""Small classifiers of any family, with cells that their own tokenizer has prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cellray.core.batch import CellBatch
from cellray.core.draw import Draw
from cellray.core.section import build_section
from cellray.data.tokens import make_tokenizer, tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.models.base import BuildContext, CellModel, build_model, family
from cellray.objectives.base import Objective
from cellray.testing import random_block
from cellray.train.adapt import Adapted, adapt_model
from cellray.train.config import AdaptSection, OptimSection
from cellray.train.engine import build_engine, world_size
from cellray.train.job import build_objective
from cellray.train.microbatch import Collator
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


def trained_losses(
    name: str, engine: str, stage: int, keys: dict[str, Any], steps: int = 4
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and weights of a few steps with ``[adapt]``; each rank takes its share of cells."""
    ready = classifier(name)
    adapted(ready, **keys)
    optim = OptimSection(lr=3e-3, clip_norm=0.5, weight_decay=0.1)
    made = build_engine(
        ready.model, ready.objective, name=engine, zero_stage=stage, optim=optim, precision="fp32"
    )
    world = world_size()
    rank = torch.distributed.get_rank() if world > 1 else 0
    share = CELLS // world
    mine = _rows(ready.batch, slice(rank * share, (rank + 1) * share))
    losses = [made.step([mine], lr=3e-3).loss for _ in range(steps)]
    return losses, {key: value.numpy() for key, value in made.weights().items()}


def _rows(batch: CellBatch, rows: slice) -> CellBatch:
    from dataclasses import fields, replace

    cut = {
        f.name: value[rows]
        for f in fields(batch)
        if isinstance(value := getattr(batch, f.name), torch.Tensor) and len(value) == CELLS
    }
    codes = {name: code[rows] for name, code in batch.covariates.items()}
    return replace(batch, covariates=codes, **cut)
