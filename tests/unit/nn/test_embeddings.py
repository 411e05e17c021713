"""Embeddings: what is added to what."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from cellray.nn.embeddings import (
    ConditionEmbedding,
    ContinuousValueEncoder,
    NormedEmbedding,
    RankedEmbedding,
)


def test_ranked_embedding_adds_token_position_and_the_first_type():
    module = RankedEmbedding(10, num_positions=4, width=6, layer_norm_eps=1e-12, dropout=0.0).eval()
    tokens = torch.tensor([[3, 9, 0]])
    total = (
        module.token.weight[[3, 9, 0]] + module.position.weight[:3] + module.token_type.weight[0]
    )
    want = functional.layer_norm(total, (6,), eps=1e-12)
    torch.testing.assert_close(module(tokens)[0], want)


def test_normed_embedding_has_zero_mean_and_unit_variance():
    out = NormedEmbedding(10, width=64)(torch.arange(10))
    torch.testing.assert_close(out.mean(-1), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(-1, unbiased=False), torch.ones(10), atol=1e-3, rtol=0)


def test_values_above_512_are_clipped():
    module = ContinuousValueEncoder(8, dropout=0.0)
    out = module(torch.tensor([[511.0, 512.0, 513.0, 9_999.0]]))[0]
    assert torch.equal(out[1], out[2])
    assert torch.equal(out[1], out[3])
    assert not torch.equal(out[0], out[1])


def test_value_encoder_is_linear_relu_linear_norm():
    module = ContinuousValueEncoder(8, dropout=0.3).eval()
    by_hand = nn.Sequential(module.lift, nn.ReLU(), module.mix, module.norm)
    values = torch.tensor([[0.0, -2.0, 50.0]])
    torch.testing.assert_close(module(values), by_hand(values[..., None]))


def test_an_unknown_condition_adds_nothing():
    module = ConditionEmbedding(3, width=5)
    out = module(torch.tensor([2, -1, 0]))
    assert torch.equal(out[0], module.table.weight[2])
    assert torch.equal(out[1], torch.zeros(5))
    assert torch.equal(out[2], module.table.weight[0])
