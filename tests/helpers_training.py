"""A few training steps of a small model of any family on made-up cells."""

from __future__ import annotations

import numpy as np
import torch

from cellray.core import registry
from cellray.core.draw import Draw
from cellray.core.section import build_section
from cellray.data.tokens import make_tokenizer, tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.models.base import BuildContext, build_model, family
from cellray.testing import random_block
from cellray.train.config import OptimSection
from cellray.train.engine import build_engine, world_size
from cellray.train.job import build_objective
from cellray.train.microbatch import Collator
from cellray.train.optim import learning_rate

STEPS, CELLS_GLOBAL = 6, 8
FAMILIES = registry.names("cellray.models")
# Debug sizes; a family takes those of its keys.
SIZES = {
    "width": 16, "num_layers": 2, "num_heads": 2, "ffn_width": 32, "dropout": 0.0, "head_width": 8,
    "decoder_width": 12, "decoder_layers": 1, "decoder_heads": 2, "decoder_head_width": 8,
    "decoder_ffn_width": 16, "value_bins": 7, "gene_sets": "", "max_sets": 6,
    "random_fraction": 0.3, "drop_path": 0.0,
}  # fmt: skip
OPTIM = OptimSection(lr=3e-3, warmup_steps=2, clip_norm=0.5, weight_decay=0.1)


def losses_of(
    name: str, engine: str, stage: int, cells_micro: int, extra: dict | None = None, genes: int = 50
) -> tuple[list[float], dict]:
    """Train ``STEPS`` steps; this rank takes its share of each global batch."""
    unit = family(name)
    specials = tokenizer_unit(unit.tokenizer).specials
    ids = [f"ENSG{i:011d}" for i in range(genes)]
    vocab = Vocab.from_genes(ids, [""] * genes, specials=specials)
    vocab = vocab.with_medians(np.linspace(0.5, 3, genes).astype(np.float32))
    block = random_block(STEPS * CELLS_GLOBAL, num_genes=genes, genes_per_cell=20, seed=1)
    tokenizer = make_tokenizer({"name": unit.tokenizer, "max_tokens": 24}, vocab)
    objective = build_objective({"name": unit.objective}, vocab)
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k in unit.config.model_fields} | (extra or {})
    config = build_section(unit.config, {"family": name, **sizes})
    vocab = unit.prepare(config, vocab)
    classes = 3 if unit.objective == "classification" else 0
    model = build_model(name, config, BuildContext(vocab, max_tokens=24), num_classes=classes)
    world = world_size()
    rank = torch.distributed.get_rank() if world > 1 else 0
    made = build_engine(
        model,
        objective,
        name=engine,
        zero_stage=stage,
        optim=OPTIM,
        precision="fp32",
    )
    collator = Collator(objective, vocab.pad, cells_micro, seed=5)
    losses = []
    for step in range(STEPS):
        share = CELLS_GLOBAL // world
        first = step * CELLS_GLOBAL + rank * share
        mine = block.take(np.arange(first, first + share))
        codes = {"label": mine.joinids % 3} if classes else {}
        batches = collator(tokenizer(mine, Draw(5)), codes, epoch=0, step=step)
        lr = learning_rate(step, total_steps=STEPS, optim=OPTIM)
        losses.append(made.step(batches, lr=lr).loss)
    return losses, {k: v.numpy() for k, v in made.weights().items()}
