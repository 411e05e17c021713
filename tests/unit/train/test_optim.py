"""The learning rate as arithmetic; weight decay only where it belongs."""

import pytest
import torch
from torch import nn

from cellray.train.config import OptimSection
from cellray.train.optim import build_adamw, learning_rate, set_learning_rate


def curve(optim, total):
    return [learning_rate(s, total_steps=total, optim=optim) for s in range(total)]


def test_warm_up_then_linear_decay():
    optim = OptimSection(lr=1.0, warmup_steps=4, schedule="linear")
    assert curve(optim, 8) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_cosine_ends_at_the_final_fraction():
    optim = OptimSection(lr=2.0, schedule="cosine", final_lr_fraction=0.1)
    values = curve(optim, 101)
    assert values[0] == 2.0
    assert learning_rate(101, total_steps=101, optim=optim) == pytest.approx(0.2)
    assert values == sorted(values, reverse=True)
    half = learning_rate(50, total_steps=100, optim=optim)
    assert half == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))


def test_constant():
    assert set(curve(OptimSection(lr=0.5, schedule="constant"), 5)) == {0.5}


def test_vectors_have_no_weight_decay():
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = build_adamw(module, OptimSection(weight_decay=0.3))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    expected = {id(p): 0.3 if p.ndim == 2 else 0.0 for p in module.parameters()}
    assert decays == expected
    set_learning_rate(optimizer, 0.125)
    assert {g["lr"] for g in optimizer.param_groups} == {0.125}


def test_frozen_parameters_are_left_out():
    module = nn.Linear(3, 2)
    module.weight.requires_grad_(False)
    optimizer = build_adamw(module, OptimSection())
    assert [p for g in optimizer.param_groups for p in g["params"]] == [module.bias]
    assert isinstance(optimizer, torch.optim.AdamW)
