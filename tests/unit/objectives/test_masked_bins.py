"""Masked bins: how many genes are chosen, what becomes of them, what the loss counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.draw import Draw
from cellray.core.errors import DataError
from cellray.core.section import build_section
from cellray.data.vocab import Vocab
from cellray.objectives.masked_bins import OBJECTIVE


def make(num_cells: int, lengths: list[int]) -> CellBatch:
    longest = max(lengths)
    rng = np.random.default_rng(0)
    tokens = np.stack([rng.permutation(80)[:longest] + 1 for _ in range(num_cells)])
    mask = np.arange(longest) < np.array(lengths)[:, None]
    values = rng.integers(1, 6, tokens.shape).astype(np.float32)
    return CellBatch(
        cell_ids=torch.arange(num_cells),
        token_ids=torch.from_numpy(np.where(mask, tokens, 0)),
        values=torch.from_numpy(np.where(mask, values, 0)).float(),
        attention_mask=torch.from_numpy(mask),
    )


def objective():
    ids = [f"G{i}" for i in range(80)]
    vocab = Vocab.from_genes(ids, ids, specials=("<pad>",))
    return OBJECTIVE.build(build_section(OBJECTIVE.config, {"name": "masked_bins"}), vocab)


@pytest.mark.parametrize(("length", "wanted"), [(1, 1), (6, 1), (7, 2), (20, 3), (60, 9)])
def test_fifteen_percent_of_the_expressed_genes_are_chosen_rounded_up(length, wanted):
    got = objective().corrupt(make(5, [length] * 5), Draw(0))
    assert got.target_mask.sum(1).tolist() == [wanted] * 5


def test_ninety_percent_of_the_chosen_are_hidden_and_the_rest_stays():
    batch = make(800, [60] * 800)
    got = objective().corrupt(batch, Draw(0))
    assert not (got.unknown_mask & ~got.target_mask).any()
    hidden = int(got.unknown_mask.sum())
    assert stats.binomtest(hidden, got.num_targets, 0.9).pvalue > 1e-3
    assert (got.values[got.unknown_mask] == 0).all()
    stays = got.target_mask & ~got.unknown_mask
    assert torch.equal(got.values[stays], batch.values[stays])
    assert torch.equal(got.targets, batch.values)


def test_genes_of_bin_zero_are_never_chosen():
    batch = make(30, [40] * 30)
    batch.values[:, ::2] = 0.0
    got = objective().corrupt(batch, Draw(0))
    assert not got.target_mask[:, ::2].any()
    assert got.target_mask.sum(1).tolist() == [3] * 30  # ceil(0.15 * 20)


def test_the_loss_is_the_cross_entropy_over_bins():
    got = objective().corrupt(make(3, [20, 9, 4]), Draw(0))
    logits = torch.randn(got.num_targets, 7)
    loss = objective().loss(
        ModelOutput(torch.zeros(1), torch.zeros(1), {"bin_logits": logits}), got
    )
    bins = got.targets[got.target_mask].long()
    want = -torch.log_softmax(logits, -1)[torch.arange(len(bins)), bins].sum()
    assert loss.total.item() == pytest.approx(want.item(), rel=1e-6)
    assert loss.num_targets == 3 + 2 + 1
    assert loss.parts["accuracy"].item() == (logits.argmax(-1) == bins).sum().item()
    with pytest.raises(DataError, match="reads the prediction 'bin_logits'"):
        objective().loss(ModelOutput(torch.zeros(1), torch.zeros(1)), got)
