"""Training a part on two gloo workers: every engine and ZeRO stage gives what one process gives.

Tolerance as in ``test_zero_parity``: the sums are reduced in another order.
"""

from __future__ import annotations

import numpy as np
import pytest

from cellray.testing import run_distributed
from helpers_adapting import every_part, trained_part

LORA = {"mode": "lora", "rank": 4, "alpha": 8.0}
LAST = {"mode": "last_layers", "last_layers": 1}
FAMILY = "geneformer"


@pytest.fixture(scope="module")
def alone():
    """One process, plain AdamW."""
    return {key["mode"]: trained_part(FAMILY, "torch", 0, key) for key in (LORA, LAST)}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Every case on two ranks."""
    cases = {
        f"{engine} {stage} {key['mode']}": (FAMILY, engine, stage, key)
        for engine, stage in (("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2))
        for key in (LORA, LAST)
    }
    halved = {
        name: (FAMILY, first, second, LORA, str(tmp_path_factory.mktemp("halves")))
        for name, first, second in (
            ("torch, then ZeRO 2", ("torch", 0), ("deepspeed", 2)),
            ("ZeRO 1, then torch", ("deepspeed", 1), ("torch", 0)),
        )
    }
    return run_distributed(every_part, world=2, args=(cases, halved))


def check(ranks, want):
    for got in ranks:
        np.testing.assert_allclose(got.losses, want.losses, rtol=2e-6)
        assert got.weights.keys() == want.weights.keys()
        for name, value in want.weights.items():
            np.testing.assert_allclose(got.weights[name], value, atol=2e-4, err_msg=name)
        assert got.parts["accuracy"] == pytest.approx(want.parts["accuracy"], abs=1e-12)
        assert got.parts["macro_f1"] == pytest.approx(want.parts["macro_f1"], abs=1e-12)
        assert 0 < got.parts["macro_f1"] < 1
    assert any(name.endswith("lora.up") for name in want.weights) or want.losses[-1] > 0


@pytest.mark.parametrize("mode", ["lora", "last_layers"])
@pytest.mark.parametrize("engine", ["torch 0", "deepspeed 0", "deepspeed 1", "deepspeed 2"])
def test_two_workers_equal_one(engine, mode, two, alone):
    check([parts[f"{engine} {mode}"] for parts, _ in two], alone[mode])


@pytest.mark.parametrize("name", ["torch, then ZeRO 2", "ZeRO 1, then torch"])
def test_factors_and_their_moments_go_on_under_another_engine(name, two, alone):
    for _, halved in two:
        assert halved[name].keys() == alone["lora"].weights.keys()
        for key, value in alone["lora"].weights.items():
            np.testing.assert_allclose(halved[name][key], value, atol=2e-4, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("key", [LORA, LAST])
def test_zero_3_equals_one_process(key, alone):
    check(
        run_distributed(trained_part, world=2, args=(FAMILY, "deepspeed", 3, key)),
        alone[key["mode"]],
    )
