"""Planned memory against the growth of resident memory while real steps run; 20 % either way.

CPU only: one fresh process a case, or two gloo workers for ZeRO. What a GPU's kernels keep is not
measured here.
"""

from __future__ import annotations

import pytest

from cellray.nn.activations import Activations
from cellray.ops.memory import model_states, peak_memory
from cellray.testing import run_distributed
from helpers_memory import PLAIN_MALLOC, grown_by_steps, in_fresh_process

TORCH = {"name": "torch", "zero_stage": 0, "precision": "fp32", "offload": "none"}
LONG = {"genes_B": [512] * 4, "num_genes": 2000}
CASES = {
    "geneformer": (
        {"width": 256, "num_layers": 6, "num_heads": 4, "ffn_width": 512, "dropout": 0.0},
        {}, 1, {"genes_B": [512] * 4, "num_genes": 12_000},
    ),
    "geneformer, dropout": (
        {"width": 256, "num_layers": 4, "num_heads": 4, "ffn_width": 512, "dropout": 0.02},
        {}, 1, LONG,
    ),
    "geneformer, bf16, packed": (
        {"width": 256, "num_layers": 6, "num_heads": 4, "ffn_width": 512, "dropout": 0.0},
        {"precision": "bf16"}, 1, {"genes_B": [512, 512, 400, 300], "num_genes": 12_000,
                                   "packed": True},
    ),
    "scgpt": (
        {"width": 256, "num_layers": 4, "num_heads": 4, "ffn_width": 256, "dropout": 0.0},
        {}, 2, {"genes_B": [512] * 4, "num_genes": 20_000},
    ),
    "scbert": (
        {"width": 128, "num_layers": 4, "num_heads": 4, "ffn_width": 512, "head_width": 32},
        {}, 1, {"genes_B": [400, 400], "num_genes": 6000},
    ),
    "scfoundation": (
        {"width": 128, "num_layers": 3, "num_heads": 4, "ffn_width": 512, "dropout": 0.0,
         "decoder_width": 128, "decoder_layers": 3, "decoder_heads": 4, "decoder_head_width": 32,
         "decoder_ffn_width": 512},
        {}, 1, {"genes_B": [600, 600], "num_genes": 6000},
    ),
    "tosica": (
        {"gene_sets": "", "max_sets": 300, "random_fraction": 0.05, "dropout": 0.1},
        {}, 1, {"genes_B": [600] * 24, "num_genes": 3000},
    ),
}  # fmt: skip


def estimate(engine: dict, workers: int, passes: int, found: dict[str, float]) -> float:
    states = model_states(
        found["values"],
        engine=engine["name"],
        stage=engine["zero_stage"],
        workers=workers,
        bf16=engine["precision"] == "bf16",
        offload=engine["offload"],
    )
    acts = Activations(found["saved"], found["passing"])
    # a CPU worker's host memory is its own
    return peak_memory(states, acts, passes=passes) + states.host


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_one_worker(case):
    sizes, changed, passes, batch = CASES[case]
    engine = {**TORCH, **changed}
    found = in_fresh_process(
        {"name": case.split(",")[0], "sizes": sizes, "engine": engine, "passes": passes, **batch}
    )
    assert found["peak"] > 100e6, "too small to tell"
    assert estimate(engine, 1, passes, found) == pytest.approx(found["peak"], rel=0.2)


WIDE = {"width": 512, "num_layers": 8, "num_heads": 8, "ffn_width": 2048, "dropout": 0.0}


def on_two(engine: dict) -> dict[str, float]:
    batch = {"genes_B": [20, 20], "num_genes": 1000, "max_tokens": 64}
    return grown_by_steps("geneformer", WIDE, engine, 2, **batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "precision", "offload"),
    [
        ("torch", 0, "fp32", "none"),
        ("deepspeed", 0, "fp32", "none"),
        ("deepspeed", 1, "fp32", "none"),
        ("deepspeed", 2, "fp32", "none"),
        ("deepspeed", 3, "fp32", "none"),
        ("deepspeed", 1, "bf16", "none"),
        ("deepspeed", 2, "bf16", "none"),
        ("deepspeed", 3, "bf16", "none"),
        ("deepspeed", 1, "fp32", "optimizer"),
        ("deepspeed", 3, "fp32", "parameters"),
    ],
)
def test_two_workers(name, stage, precision, offload, monkeypatch):
    for key, value in PLAIN_MALLOC.items():
        monkeypatch.setenv(key, value)
    engine = {"name": name, "zero_stage": stage, "precision": precision, "offload": offload}
    for found in run_distributed(on_two, world=2, args=(engine,)):
        assert estimate(engine, 2, 2, found) == pytest.approx(found["peak"], rel=0.2)


def test_sharding_divides_what_it_says():
    def held(stage: int, workers: int, **kind: object) -> float:
        states = model_states(
            1e9, engine="deepspeed", stage=stage, workers=workers, bf16=True, **kind
        )
        return states.held / 1e9

    assert [held(stage, 8) for stage in (0, 1, 2, 3)] == [12.0, 3.5, 3.5, 1.75]
    assert held(3, 8, offload="parameters") == 0.0
    assert held(2, 8, offload="optimizer") == 2.0


def test_buckets_and_gathered_weights_have_a_limit():
    big = model_states(1e11, engine="deepspeed", stage=3, workers=64, bf16=True, on_gpu=True)
    assert big.gathered == 2e9
    assert big.reducing == max(4 * 2e8, 4e11 / 64)


def test_gradients_wait_for_later_passes_only():
    states = model_states(1e6, engine="torch", stage=0, workers=1, bf16=False)
    acts = Activations(1e9, 0.0)
    assert peak_memory(states, acts, passes=1) == 12e6 + 1e9
    assert peak_memory(states, acts, passes=3) == 16e6 + 1e9
    assert peak_memory(states, Activations(), passes=1) == 16e6
