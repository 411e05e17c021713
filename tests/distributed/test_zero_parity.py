"""ZeRO stages 0 to 3 on two gloo workers give the losses of plain single-process AdamW.

Tolerance: 2e-6 relative on the losses of 6 float32 steps with clipping, warm-up and accumulation
(the sums are reduced in another order), 2e-4 absolute on the weights after them. Each case has its
own processes: ZeRO 3 patches torch for the whole process.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellray.core import registry
from cellray.core.draw import Draw
from cellray.core.section import build_section
from cellray.data.tokens import make_tokenizer, tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.models.base import BuildContext, build_model, family
from cellray.testing import random_block, run_distributed
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
TOLERANCE = 2e-6
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


@pytest.fixture(scope="module")
def reference():
    """Plain AdamW in one process, one micro-batch a step."""
    return {name: losses_of(name, "torch", 0, CELLS_GLOBAL) for name in FAMILIES}


def check(results, expected):
    losses, weights = expected
    for got, got_weights in results:
        np.testing.assert_allclose(got, losses, rtol=TOLERANCE, atol=0)
        assert got_weights.keys() == weights.keys()
        for key, value in weights.items():
            got_value = got_weights[key]
            if key.endswith("qkv.bias") and "encoder.blocks" in key:
                # Softmax does not see a key's bias: its gradient is rounding, which Adam makes
                # steps of.
                queries, _, values = np.split(value, 3)
                value = np.concatenate([queries, values])
                queries, _, values = np.split(got_value, 3)
                got_value = np.concatenate([queries, values])
            np.testing.assert_allclose(got_value, value, atol=2e-4, err_msg=key)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_stage_equals_plain_adamw(stage, reference):
    results = run_distributed(losses_of, world=2, args=("scgpt", "deepspeed", stage, 2))
    check(results, reference["scgpt"])


def test_zero_2_equals_plain_adamw_for_geneformer(reference):
    results = run_distributed(losses_of, world=2, args=("geneformer", "deepspeed", 2, 4))
    check(results, reference["geneformer"])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_torch_engine_on_two_ranks_equals_one(name, reference):
    results = run_distributed(losses_of, world=2, args=(name, "torch", 0, 2))
    check(results, reference[name])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("scfoundation", marks=pytest.mark.slow),
        pytest.param("scbert", marks=pytest.mark.slow),
        pytest.param("geneformer", marks=pytest.mark.slow),
    ],
)
def test_zero_3_equals_plain_adamw_for_other_families(name, reference):
    results = run_distributed(losses_of, world=2, args=(name, "deepspeed", 3, 2))
    check(results, reference[name])


def test_accumulation_does_not_change_the_loss(reference):
    check([losses_of("scgpt", "torch", 0, 2)], reference["scgpt"])


def test_zero_3_exports_a_frozen_table_whole():
    """A table above ZeRO's persistence threshold (1e5 values) is sharded although it is frozen."""
    arguments = ({"freeze_genes": True, "width": 48}, 2300)
    alone = losses_of("scbert", "torch", 0, CELLS_GLOBAL, *arguments)
    results = run_distributed(losses_of, world=2, args=("scbert", "deepspeed", 3, 4, *arguments))
    check(results, alone)
    assert results[0][1]["genes.weight"].shape == (2301, 48)
