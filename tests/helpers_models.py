"""A family's model of any size with a batch that its own tokenizer and objective have prepared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cellray.core.batch import CellBatch
from cellray.core.blocks import CellBlock
from cellray.core.draw import Draw
from cellray.core.section import build_section
from cellray.data.tokens import make_tokenizer, tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.models.base import BuildContext, CellModel, build_model, family
from cellray.objectives.base import Objective
from cellray.train.job import build_objective
from cellray.train.microbatch import Collator

NUM_CLASSES = 3


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` makes."""

    model: CellModel
    objective: Objective
    batch: CellBatch
    vocab: Vocab


def cells_of(genes_B: Sequence[int], *, num_genes: int, seed: int = 1) -> CellBlock:
    """Cells that express so many genes each."""
    rng = np.random.default_rng(seed)
    genes = [np.sort(rng.permutation(num_genes)[:count]) for count in genes_B]
    counts = [rng.geometric(0.3, size=len(g)).astype(np.float32) for g in genes]
    return CellBlock(
        joinids=np.arange(len(genes_B), dtype=np.int64),
        indptr=np.concatenate([[0], np.cumsum(genes_B)]).astype(np.int64),
        genes=np.concatenate(genes).astype(np.int32),
        counts=np.concatenate(counts),
        library_sizes=np.array([c.sum() for c in counts], dtype=np.float32),
    )


def prepare(
    name: str,
    sizes: Mapping[str, Any],
    *,
    genes_B: Sequence[int],
    num_genes: int,
    packed: bool = False,
    max_tokens: int = 4096,
    tokenizer: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
) -> Prepared:
    """Build a family's model and one micro-batch for it.

    Args:
        name: the family.
        sizes: keys of ``[model]``; those a family does not have are left out.
        genes_B: genes that each cell expresses.
        num_genes: genes of the vocabulary.
        packed: lay the cells end to end.
        max_tokens: of the tokenizer.
        tokenizer: further keys of ``[tokenizer]``.
        objective: further keys of ``[objective]``.
    """
    unit = family(name)
    ids = [f"ENSG{i:011d}" for i in range(num_genes)]
    specials = tokenizer_unit(unit.tokenizer).specials
    vocab = Vocab.from_genes(ids, [""] * num_genes, specials=specials)
    vocab = vocab.with_medians(np.linspace(0.5, 3, num_genes).astype(np.float32))
    config = build_section(
        unit.config,
        {"family": name, **{k: v for k, v in sizes.items() if k in unit.config.model_fields}},
    )
    vocab = unit.prepare(config, vocab)
    classes = NUM_CLASSES if unit.objective == "classification" else 0
    torch.manual_seed(0)
    context = BuildContext(vocab, max_tokens=max_tokens)
    model = build_model(name, config, context, num_classes=classes)
    keys = {"name": unit.tokenizer, "max_tokens": max_tokens, **(tokenizer or {})}
    made = build_objective({"name": unit.objective, **(objective or {})}, vocab)
    block = cells_of(genes_B, num_genes=num_genes)
    codes = {"label": block.joinids % NUM_CLASSES} if classes else {}
    collate = Collator(made, vocab.pad, len(genes_B), seed=5, packed=packed)
    (batch,) = collate(make_tokenizer(keys, vocab)(block, Draw(5)), codes, epoch=0)
    return Prepared(model, made, batch, vocab)
