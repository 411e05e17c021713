"""FLOP counts against torch's counter, which watches the products that a forward pass runs.

The counter sees forward passes of unpadded cells under full attention; training is three of them
but for what takes no gradient (random features, TOSICA's values).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cellray.core import registry
from cellray.core.batch import pack
from cellray.models.base import CellModel
from cellray.nn.flops import (
    encoder_flops,
    favor_flops,
    performer_flops,
    training_encoder_flops,
    training_performer_flops,
)
from helpers_models import Prepared, prepare

FAMILIES = registry.names("cellray.models")
SIZES = {
    "width": 48, "num_layers": 3, "num_heads": 4, "ffn_width": 80, "dropout": 0.0, "head_width": 16,
    "decoder_width": 32, "decoder_layers": 2, "decoder_heads": 4, "decoder_head_width": 8,
    "decoder_ffn_width": 64, "value_bins": 7, "gene_sets": "", "max_sets": 40,
    "random_fraction": 0.1, "drop_path": 0.0,
}  # fmt: skip
ALIKE = [60] * 4
UNLIKE = [20, 90, 35, 60]


def prepared(name: str, genes_B: list[int], **kind: object) -> Prepared:
    return prepare(name, SIZES, genes_B=genes_B, num_genes=300, **kind)


def forward_flops(case: Prepared) -> float:
    """What torch counts in a forward pass that sees every key.

    Attention runs as plain products: the counter does not know torch's fused kernel for CPUs.
    """
    with watched() as counter, sdpa_kernel(SDPBackend.MATH):
        case.model.train()(case.batch)
    return float(counter.get_total_flops())


def watched() -> FlopCounterMode:
    return FlopCounterMode(display=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_is_three_of_the_forward_passes_that_torch_counts(name):
    case = prepared(name, ALIKE)
    if case.batch.unknown_mask is not None and name == "scgpt":
        # hidden by value, as the generative mask leaves out keys, which is not counted
        case = prepared(name, ALIKE, objective={"hide": "value"})
    ours = case.model.batch_flops(case.batch)
    saved = {
        # random features take no gradient of their own
        "scbert": favor_flops(4 * 301, num_heads=4, head_width=16, num_features=44)[0] * 3,
        "scfoundation": favor_flops(4 * 302, num_heads=4, head_width=8, num_features=16)[0] * 2,
        # values take none
        "tosica": 2.0 * 4 * 40 * 30 * 48,
    }.get(name, 0.0)
    assert ours + saved == pytest.approx(3 * forward_flops(case), rel=0.03)


def test_the_backward_pass_is_twice_the_forward_pass_of_an_encoder():
    case = prepared("geneformer", ALIKE)
    case.model.train()
    with watched() as counter, sdpa_kernel(SDPBackend.MATH):
        case.objective.loss(case.model(case.batch), case.batch).total.backward()
    ours = case.model.batch_flops(case.batch)
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_counts_nothing(name):
    case = prepared(name, UNLIKE)
    padded = case.model.batch_flops(case.batch)
    packed = case.model.batch_flops(pack(case.batch))
    assert padded == packed > 0


def test_squares_are_summed_cell_by_cell():
    sizes = {"num_layers": 2, "width": 8, "ffn_width": 16}
    lengths = np.array([3, 5])
    apart = sum(encoder_flops(np.array([n]), **sizes) for n in lengths)
    assert encoder_flops(lengths, **sizes) == apart
    # L (24 n d^2 + 4 n^2 d) with d_ff = 2 d in the place of 4 d: 16 n d^2
    assert apart == 2 * (16 * 8 * 8 * 8 + 4 * (9 + 25) * 8)


def test_the_formulae_of_the_evaluation_note():
    """F = L (72 n d^2 + 12 n^2 d) where d_ff = 4 d; a Performer's sums are 12 n m d."""
    d, n, layers = 768, 2048, 12
    ours = training_encoder_flops(np.array([n]), num_layers=layers, width=d, ffn_width=4 * d)
    assert ours == layers * (72 * n * d * d + 12 * n * n * d)
    sizes = {"num_layers": 1, "width": 512, "num_heads": 8, "head_width": 64, "ffn_width": 2048}
    with_sums = training_performer_flops(float(n), **sizes, num_features=266)
    without = training_performer_flops(float(n), **sizes, num_features=0)
    features = 8 * n * 266 * 512
    assert with_sums - without - features == pytest.approx(12 * n * 266 * 512, rel=0.01)
    assert performer_flops(2.0 * n, **sizes, num_features=266) == 2 * performer_flops(
        float(n), **sizes, num_features=266
    )


def test_no_lookups_are_counted():
    """Ten times the genes change an encoder's count by the head alone."""
    few = prepare("geneformer", SIZES, genes_B=ALIKE, num_genes=100)
    many = prepare("geneformer", SIZES, genes_B=ALIKE, num_genes=1000)
    lengths = np.array([60] * 4)
    assert few.model.training_flops(lengths, 0) == many.model.training_flops(lengths, 0)
    head = many.model.training_flops(lengths, 7) - few.model.training_flops(lengths, 7)
    assert head == 6 * 7 * 48 * 900


def test_the_cell_prompt_is_a_second_pass():
    case = prepared("scgpt", ALIKE, objective={"hide": "value"})
    prompted = replace(case, batch=replace(case.batch, cell_prompt=True))
    once, twice = case.model.batch_flops(case.batch), prompted.model.batch_flops(prompted.batch)
    assert 1.9 < twice / once < 2.0
    assert twice == pytest.approx(3 * forward_flops(prompted), rel=0.03)


def test_the_decoder_counts_only_where_something_is_predicted():
    case = prepared("scfoundation", ALIKE)
    lengths = case.model.read_lengths(case.batch)
    assert case.model.training_flops(lengths, 0) < 0.5 * case.model.training_flops(lengths, 1)
    assert lengths.max() < 60 + 2  # hidden genes and chosen zeros are not read


def test_a_model_that_does_not_count_says_nothing():
    assert CellModel().training_flops(np.array([5, 6]), 3.0) == 0.0
