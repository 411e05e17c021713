"""Heads against their formulae."""

from __future__ import annotations

import torch
from torch import nn

from cellray.nn.heads import (
    CellGeneDecoder,
    ExpressionDecoder,
    GeneAxisClassifier,
    MlpClassifier,
    NormedClassifier,
    PooledClassifier,
    TiedTokenDecoder,
)


def test_tied_decoder_multiplies_with_the_table_and_adds_its_bias():
    head = TiedTokenDecoder(11, width=6, activation=nn.ReLU(), layer_norm_eps=1e-12)
    nn.init.normal_(head.bias)
    table, hidden = torch.randn(11, 6), torch.randn(4, 6)
    want = head.norm(torch.relu(head.dense(hidden))) @ table.T + head.bias
    torch.testing.assert_close(head(hidden, table), want)
    assert head(hidden[:0], table).shape == (0, 11)


def test_cell_gene_decoder_is_a_dot_product_of_gene_queries_and_cells():
    head = CellGeneDecoder(6)
    genes, cells = torch.randn(5, 6), torch.randn(5, 6)
    queries = torch.sigmoid(genes @ head.query.weight.T + head.query.bias) @ head.project.weight.T
    torch.testing.assert_close(head(genes, cells), (queries * cells).sum(1))


def test_expression_decoder_gives_one_value_per_token():
    head = ExpressionDecoder(6)
    assert head(torch.randn(5, 6)).shape == (5,)
    assert [type(m).__name__ for m in head.layers] == [
        "Linear",
        "LeakyReLU",
        "Linear",
        "LeakyReLU",
        "Linear",
    ]


def test_mlp_classifier_has_two_normed_layers_before_the_last():
    head = MlpClassifier(6, num_classes=3, num_hidden=2)
    kinds = [type(m).__name__ for m in head.layers]
    assert kinds == ["Linear", "ReLU", "LayerNorm"] * 2 + ["Linear"]
    assert head(torch.randn(4, 6)).shape == (4, 3)


def test_pooled_classifier_is_tanh_then_linear():
    head = PooledClassifier(6, num_classes=3, dropout=0.5).eval()
    x = torch.randn(4, 6)
    torch.testing.assert_close(head(x), head.classifier(torch.tanh(head.pooler(x))))


def test_the_normed_classifier_trains_on_one_cell_and_keeps_its_statistics():
    head = NormedClassifier(6, num_classes=3).train()
    before = head.norm.running_mean.clone()
    logits = head(torch.randn(1, 6))
    assert torch.isfinite(logits).all()
    assert torch.equal(head.norm.running_mean, before)
    head(torch.randn(4, 6))
    assert not torch.equal(head.norm.running_mean, before)


def test_the_gene_axis_classifier_is_a_convolution_over_places():
    head = GeneAxisClassifier(5, num_classes=3, dropout=0.0, num_places=7)
    panel = torch.randn(2, 7, 5)
    kernel = head.squeeze.weight.view(1, 1, 1, 5)
    numbers = torch.nn.functional.conv2d(panel[:, None], kernel, head.squeeze.bias).relu()
    torch.testing.assert_close(head(panel), head.layers(numbers.flatten(1)))
