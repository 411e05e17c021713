"""First values of weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from cellray.nn.attention import SelfAttention
from cellray.nn.init import init_bert, init_transformer


def test_bert_start_is_normal_with_two_hundredths():
    torch.manual_seed(0)
    layer, table, norm = nn.Linear(300, 300), nn.Embedding(300, 300), nn.LayerNorm(300)
    nn.Sequential(layer, table, norm).apply(init_bert)
    for weight in (layer.weight, table.weight):
        assert abs(weight.std().item() - 0.02) < 2e-4
    assert torch.equal(layer.bias, torch.zeros(300))
    assert torch.equal(norm.weight, torch.ones(300))


def test_transformer_start_is_xavier_in_attention():
    torch.manual_seed(0)
    layer = SelfAttention(64, num_heads=2, dropout=0.0)
    layer.apply(init_transformer)
    bound = math.sqrt(6 / (64 + 192))
    assert layer.qkv.weight.abs().max() <= bound
    assert layer.qkv.weight.abs().max() > 0.99 * bound
    assert torch.equal(layer.qkv.bias, torch.zeros(192))
    assert torch.equal(layer.out.bias, torch.zeros(64))
