"""Engines give and take their state: any stage, any number of workers, offload, bf16, bad steps.

Tolerance where fp32 curves are compared: 2e-6 relative on the loss (sums are reduced in another
order). Processes take seconds to start, so one group of them runs many cases; those of ZeRO 3,
which patches torch for the whole process, have groups of their own.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cellray.core.draw import Draw
from cellray.core.section import build_section
from cellray.data.tokens import make_tokenizer, tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.models.base import BuildContext, build_model, family
from cellray.nn.recompute import recompute_blocks
from cellray.testing import random_block, run_distributed
from cellray.train.checkpoint import write_tensors
from cellray.train.config import OptimSection
from cellray.train.engine import build_engine, world_size
from cellray.train.job import build_objective
from cellray.train.loop import seed_step
from cellray.train.microbatch import Collator
from cellray.train.optim import learning_rate
from cellray.train.shards import optimizer_file

STEPS, HALF, CELLS_GLOBAL = 6, 3, 12
GENES = 50
OPTIM = OptimSection(lr=3e-3, warmup_steps=2, clip_norm=0.5, weight_decay=0.1)
TOLERANCE = 2e-6


def make(
    engine: str,
    stage: int,
    *,
    precision: str = "fp32",
    offload: str = "none",
    dropout: float = 0.0,
    recompute: bool = False,
    domain_norm: str = "none",
    frozen: str = "",
    weights: Path | None = None,
):
    """A small scGPT under an engine, with its tokenizer, objective and cells."""
    unit = family("scgpt")
    ids = [f"ENSG{i:011d}" for i in range(GENES)]
    vocab = Vocab.from_genes(ids, [""] * GENES, specials=tokenizer_unit(unit.tokenizer).specials)
    objective = build_objective({"name": unit.objective}, vocab)
    torch.manual_seed(0)
    sizes = {"width": 16, "num_layers": 2, "num_heads": 2, "ffn_width": 32, "dropout": dropout}
    sizes["domain_norm"] = domain_norm
    config = build_section(unit.config, {"family": "scgpt", **sizes})
    model = build_model("scgpt", config, BuildContext(vocab, max_tokens=24))
    if weights is not None:
        model.load_state_dict(torch.load(weights))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or not name.startswith(frozen))
    if recompute:
        assert recompute_blocks(model) == 2
    made = build_engine(
        model,
        objective,
        name=engine,
        zero_stage=stage,
        optim=OPTIM,
        precision=precision,
        offload=offload,
    )
    block = random_block(STEPS * CELLS_GLOBAL, num_genes=GENES, genes_per_cell=20, seed=1)
    tokens = make_tokenizer({"name": unit.tokenizer, "max_tokens": 24}, vocab)(block, Draw(5))
    return made, Collator(objective, vocab.pad, 4, seed=5), tokens


def batches_of(collator, tokens, step):
    """This rank's micro-batches; ranks that do not divide the batch have unlike shares."""
    world = world_size()
    rank = dist.get_rank() if world > 1 else 0
    rows = np.arange(step * CELLS_GLOBAL, (step + 1) * CELLS_GLOBAL)
    mine = np.array_split(rows, world)[rank]
    return collator(tokens.take(mine), {}, epoch=0, step=step)


def run_steps(made, collator, tokens, steps, *, limit=math.inf, spoil=()):
    stats = []
    for step in steps:
        lr = learning_rate(step, total_steps=STEPS, optim=OPTIM)
        seed_step(7, step, dist.get_rank() if world_size() > 1 else 0)
        batches = batches_of(collator, tokens, step)
        if step in spoil and (world_size() == 1 or dist.get_rank() == 1):
            batches[0] = replace(batches[0], targets=batches[0].targets * spoil[step])
        stats.append(made.step(batches, lr=lr, limit=limit))
    return stats


def train(engine, stage, folder="", options=None, first=0, last=STEPS):
    """Train from a saved state or anew; save at the end where there is a folder."""
    options = dict(options or {})
    start = Path(folder) / f"step{first}" if first else None
    weights = start / "weights.pt" if start else None
    made, collator, tokens = make(engine, stage, weights=weights, **options)
    if start:
        made.load(start)
    stats = run_steps(made, collator, tokens, range(first, last))
    state = made.snapshot()
    if folder:
        rank = dist.get_rank() if world_size() > 1 else 0
        target = Path(folder) / f"step{last}"
        target.mkdir(exist_ok=True)
        write_tensors(target / optimizer_file(rank, world_size()), state.optimizer)
        if rank == 0:
            torch.save(dict(state.weights), target / "weights.pt")
        else:
            assert state.weights == {}
        if world_size() > 1:
            dist.barrier()  # who goes on from it must find it whole
    return [s.loss for s in stats], {k: v.numpy() for k, v in state.weights.items()}


def uneven(engine, stage):
    """Ranks cut their cells into unlike numbers of micro-batches."""
    made, collator, tokens = make(engine, stage)
    collator = replace(collator, cells_micro=2 if dist.get_rank() else 4)
    return [s.loss for s in run_steps(made, collator, tokens, range(STEPS))]


def spoiled(engine, stage, factor, limit):
    """Step 2 is bad on rank 1."""
    made, collator, tokens = make(engine, stage)
    stats = run_steps(made, collator, tokens, range(STEPS), limit=limit, spoil={2: factor})
    return [(s.loss, s.taken, s.gradient_norm) for s in stats]


def passes(engine, stage, options):
    """Gradient norms in several passes a step; step 1 is left out."""
    made, collator, tokens = make(engine, stage, **options)
    collator = replace(collator, cells_micro=2)
    stats = run_steps(made, collator, tokens, range(4), spoil={1: math.nan})
    return [(s.gradient_norm, s.taken) for s in stats]


def without_step_2(engine, stage):
    made, collator, tokens = make(engine, stage)
    return [s.loss for s in run_steps(made, collator, tokens, [0, 1, 3, 4, 5])]


def normed(engine, stage):
    """bf16, batch norms, a frozen block; with step 2's values no numbers, and without step 2."""
    found = []
    for steps, factor in ((range(STEPS), math.nan), ((0, 1, 3, 4, 5), 1.0)):
        made, collator, tokens = make(
            engine, stage, precision="bf16", domain_norm="shared", frozen=FROZEN
        )
        before = {k: v.numpy() for k, v in made.weights().items()}
        taken = []
        for step in steps:
            seed_step(7, step, 0)
            batches = batches_of(collator, tokens, step)
            if step == 2:
                batches[0] = replace(batches[0], values=batches[0].values * factor)
            taken.append(made.step(batches, lr=OPTIM.lr).taken)
        found.append((taken, before, {k: v.numpy() for k, v in made.weights().items()}))
    return found


def halves(engine, stage, folder, options):
    """The run in one go, and stopped at step 3 and started again."""
    whole = train(engine, stage, "", options)
    train(engine, stage, folder, options, 0, HALF)
    return whole, train(engine, stage, folder, options, HALF, STEPS)


def every(cases):
    """Run many cases in one group of processes: name -> what the case gives."""
    return {name: task(*arguments) for name, (task, arguments) in cases.items()}


FROZEN = "encoder.blocks.0"
NOISY = {"dropout": 0.3, "precision": "bf16"}
HUGE = 1e6


def cases_of(engine, stage, folder):
    """What is asked of an engine on two workers."""
    key = f"{engine}{stage}"
    (folder / key).mkdir()
    (folder / f"{key}-noisy").mkdir()
    dropout = {"dropout": 0.3}
    return {
        f"{key} first": (train, (engine, stage, str(folder / key), None, 0, HALF)),
        f"{key} uneven": (uneven, (engine, stage)),
        f"{key} kept": (train, (engine, stage, "", dropout)),
        f"{key} anew": (train, (engine, stage, "", {**dropout, "recompute": True})),
        f"{key} noisy": (halves, (engine, stage, str(folder / f"{key}-noisy"), NOISY)),
        f"{key} bf16": (train, (engine, stage, "", {"precision": "bf16"})),
        f"{key} without": (without_step_2, (engine, stage)),
        f"{key} nan": (spoiled, (engine, stage, math.nan, math.inf)),
        f"{key} huge": (spoiled, (engine, stage, HUGE, 1e7)),
        f"{key} normed": (normed, (engine, stage)),
        f"{key} passes": (passes, (engine, stage, {"precision": "bf16"})),
    }


def offload_case(stage, offload, folder):
    (folder / offload).mkdir()
    options = {"offload": offload}
    return {
        offload: (halves, ("deepspeed", stage, str(folder / offload), options)),
        f"{offload} passes": (passes, ("deepspeed", stage, {**options, "precision": "bf16"})),
    }


ENGINES = [("torch", 0), *(("deepspeed", stage) for stage in range(4))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def two(folder):
    """Every case on two workers: name -> what rank 0 and rank 1 found."""
    first = {k: v for pair in ENGINES[:4] for k, v in cases_of(*pair, folder).items()}
    second = cases_of(*ENGINES[4], folder) | offload_case(3, "parameters", folder)
    first |= offload_case(2, "optimizer", folder)
    found: dict[str, list] = {}
    for cases in (first, second):
        ranks = run_distributed(every, world=2, args=(cases,))
        found |= {name: [rank[name] for rank in ranks] for name in cases}
    return found


@pytest.fixture(scope="module")
def plain():
    """Losses and weights of plain AdamW in one process."""
    return train("torch", 0)


def close(losses, expected, rtol=TOLERANCE):
    np.testing.assert_allclose(losses, expected, rtol=rtol, atol=0)


def same_weights(weights, expected):
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        if not key.endswith("qkv.bias"):  # softmax does not see a key's bias
            np.testing.assert_allclose(weights[key], value, atol=2e-4, err_msg=key)


@pytest.mark.parametrize(
    ("world", "resumed"),
    [
        (1, {"deepspeed2": ("deepspeed", 2), "torch0": ("deepspeed", 1)}),
        (2, {"deepspeed3": ("torch", 0), "deepspeed0": ("deepspeed", 1)}),
        pytest.param(
            3,
            {"deepspeed1": ("deepspeed", 3), "deepspeed3": ("deepspeed", 3)},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_state_goes_on_under_another_engine_stage_and_number_of_workers(
    world, resumed, two, plain, folder
):
    """ZeRO shards are cut anew: the second half is that of the run that never stopped."""
    for key in resumed:
        for losses, _ in two[f"{key} first"]:
            close(losses, plain[0][:HALF])
    cases = {
        key: (train, (engine, stage, str(folder / key), None, HALF, STEPS))
        for key, (engine, stage) in resumed.items()
    }
    for rank in run_distributed(every, world=world, args=(cases,)):
        for key in cases:
            close(rank[key][0], plain[0][HALF:])
            if rank[key][1]:  # rank 0 has the weights
                same_weights(rank[key][1], plain[1])


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_workers_of_unlike_shares_equal_one(world, plain):
    """12 cells over 3 and 4 ranks, micro-batches of at most 4: passes are evened out."""
    for losses, _ in run_distributed(train, world=world, args=("deepspeed", 2)):
        close(losses, plain[0])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_on_four_workers_equals_plain_adamw(stage, plain):
    for losses, _ in run_distributed(train, world=4, args=("deepspeed", stage)):
        close(losses, plain[0])


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_ranks_may_take_unlike_numbers_of_micro_batches(engine, stage, two, plain):
    for losses in two[f"{engine}{stage} uneven"]:
        close(losses, plain[0])


@pytest.mark.parametrize("offload", ["optimizer", "parameters"])
def test_offload_changes_no_loss_and_goes_on(offload, two, plain):
    for (losses, _), (rest, weights) in two[offload]:
        close(losses, plain[0])
        close(rest, plain[0][HALF:])
        if weights:
            same_weights(weights, plain[1])


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_recomputed_blocks_change_no_loss_even_with_dropout(engine, stage, two):
    """Dropout is drawn again as it was: the same curve with and without."""
    kept, anew = two[f"{engine}{stage} kept"], two[f"{engine}{stage} anew"]
    close(anew[0][0], kept[0][0])


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_a_run_with_dropout_goes_on_bit_for_bit(engine, stage, two):
    """Stopped at step 3 and started again, in bf16 with dropout: not a bit differs."""
    (whole, rest), _ = two[f"{engine}{stage} noisy"]
    assert rest[0] == whole[0][HALF:]
    assert rest[1].keys() == whole[1].keys()
    for key, value in whole[1].items():
        assert np.array_equal(rest[1][key], value), key


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_bf16_stays_close_to_float32(engine, stage, two, plain):
    """Float32 masters and losses: within 2 % of the float32 curve at every step."""
    close(two[f"{engine}{stage} bf16"][0][0], plain[0], rtol=2e-2)


@pytest.mark.parametrize("key", [f"{e}{s}" for e, s in ENGINES] + ["optimizer", "parameters"])
def test_bf16_gradients_of_several_passes_add_up_and_a_bad_step_leaves_none(key, two):
    """The norms are those of torch with autocast, within 3 %."""
    expected = [norm for norm, taken in two["torch0 passes"][0] if taken]
    for found in two[f"{key} passes"]:
        assert [taken for _, taken in found] == [True, False, True, True]
        close([norm for norm, taken in found if taken], expected, rtol=3e-2)


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_a_step_that_is_no_number_is_left_out_on_all_ranks(engine, stage, two):
    expected = two[f"{engine}{stage} without"][0]
    for stats in two[f"{engine}{stage} nan"]:
        assert [taken for _, taken, _ in stats] == [True, True, False, True, True, True]
        assert math.isnan(stats[2][0])
        close([loss for loss, taken, _ in stats if taken], expected)
        assert all(norm > 0 for _, taken, norm in stats if taken)


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_an_exploding_step_is_left_out(engine, stage, two):
    expected = two[f"{engine}{stage} without"][0]
    for stats in two[f"{engine}{stage} huge"]:
        assert [taken for _, taken, _ in stats] == [True, True, False, True, True, True]
        assert 1e7 < stats[2][0] < math.inf
        close([loss for loss, taken, _ in stats if taken], expected)


@pytest.mark.parametrize(("engine", "stage"), ENGINES)
def test_a_step_left_out_is_forgotten_by_batch_norms_and_bf16_rounds_nothing_frozen(
    engine, stage, two
):
    (taken, before, after), (others, _, expected) = two[f"{engine}{stage} normed"][0]
    assert taken == [True, True, False, True, True, True]
    assert all(others)
    assert any("running_mean" in name for name in after)
    for name, value in after.items():
        assert np.array_equal(value, expected[name]), name
    exact = two["torch0 normed"][0][0][1]
    frozen = [name for name in after if name.startswith(FROZEN)]
    assert frozen
    for name in frozen:
        assert np.array_equal(before[name], exact[name]), name
        assert np.array_equal(after[name], exact[name]), name
