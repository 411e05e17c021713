"""Generative value prediction: which genes are hidden and what the loss counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.blocks import TokenBlock
from cellray.core.draw import Draw
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.data.collate import collate_tokens
from cellray.data.vocab import Vocab
from cellray.objectives.generative import OBJECTIVE, Generative, GenerativeConfig

SPECIALS = ("<pad>", "<cls>", "<eoc>")


def make_objective(**config: object) -> Generative:
    ids = [f"G{i}" for i in range(300)]
    vocab = Vocab.from_genes(ids, ids, specials=SPECIALS)
    objective = OBJECTIVE.build(GenerativeConfig(**config), vocab)
    assert isinstance(objective, Generative)
    return objective


def make_batch(joinids: list[int], lengths: list[int], step: int = 0) -> CellBatch:
    """``<cls>`` and genes; a cell's tokens and values depend on its joinid alone."""
    tokens, values = [], []
    for joinid, length in zip(joinids, lengths, strict=True):
        rng = np.random.default_rng(joinid)
        tokens.append(np.concatenate([[1], np.sort(rng.permutation(300)[:length]) + 3]))
        values.append(np.concatenate([[-2.0], rng.integers(1, 51, length)]))
    block = TokenBlock(
        joinids=np.array(joinids),
        indptr=np.concatenate([[0], np.cumsum([len(t) for t in tokens])]),
        tokens=np.concatenate(tokens).astype(np.int32),
        values=np.concatenate(values).astype(np.float32),
    )
    return collate_tokens(block, pad=0, step=step)


def test_each_cell_hides_one_of_the_shares():
    batch = make_batch(list(range(300)), [100] * 300)
    out = make_objective().corrupt(batch, Draw(0))
    hidden = out.unknown_mask.sum(1)
    shares, times = hidden.unique(return_counts=True)
    assert shares.tolist() == [25, 50, 75]
    assert times.min() > 70
    assert torch.equal(out.target_mask, out.unknown_mask)


@pytest.mark.parametrize(
    ("length", "hidden"), [(0, 0), (1, 1), (2, 1), (3, 2), (5, 3), (9, 5), (299, 150)]
)
def test_half_is_rounded_up_and_at_least_one_gene_is_hidden(length, hidden):
    out = make_objective(mask_ratios=[0.5]).corrupt(make_batch([3], [length]), Draw(0))
    assert out.num_targets == hidden
    assert not out.unknown_mask[:, 0].any()


def test_hidden_values_are_gone_and_the_targets_hold_them():
    batch = make_batch([3, 4], [50, 80])
    out = make_objective().corrupt(batch, Draw(0))
    assert (out.values[out.unknown_mask] == 0).all()
    assert torch.equal(out.values[~out.unknown_mask], batch.values[~out.unknown_mask])
    assert torch.equal(out.targets, batch.values)
    assert not (out.unknown_mask & ~out.attention_mask).any()
    assert torch.equal(out.token_ids, batch.token_ids)


def test_a_cell_is_hidden_alike_in_any_batch_and_padding():
    objective = make_objective()
    together = objective.corrupt(make_batch([5, 9, 3], [40, 250, 90]), Draw(0))
    alone = objective.corrupt(make_batch([3], [90]), Draw(0))
    assert torch.equal(together.unknown_mask[2, :91], alone.unknown_mask[0])
    assert not together.unknown_mask[2, 91:].any()
    other = objective.corrupt(make_batch([3], [90]), Draw(0, 1))
    assert not torch.equal(other.unknown_mask, alone.unknown_mask)


def test_the_second_pass_is_asked_for_once_training_has_settled():
    objective = make_objective()
    prompts = [
        objective.corrupt(make_batch([1], [9], step=step), Draw(0)).cell_prompt
        for step in (0, 999, 1000, 5000)
    ]
    assert prompts == [False, False, True, True]
    always = make_objective(cell_prompt_after_steps=0)
    assert always.corrupt(make_batch([1], [9]), Draw(0)).cell_prompt


def output(**predictions: torch.Tensor) -> ModelOutput:
    zero = torch.zeros(1, 1, 1)
    return ModelOutput(hidden=zero, cell=zero[0], predictions=predictions)


def test_loss_sums_the_squared_errors_of_its_terms():
    objective = make_objective()
    batch = objective.corrupt(make_batch([3, 4], [50, 80]), Draw(0))
    truth = batch.targets[batch.target_mask]
    given = {
        "expression": (truth + 2).bfloat16().float(),
        "expression_from_cell": truth - 1,
        "expression_cell_prompt": truth + 3,
    }
    num = batch.num_targets
    two = objective.loss(output(**given), batch)
    assert two.num_targets == num
    assert {k: v.item() for k, v in two.parts.items()} == {
        "gep": 4.0 * num,
        "gepc": 1.0 * num,
        "cell_prompt": 0.0,
    }
    assert two.total.item() == 5.0 * num
    three = objective.loss(output(**given), replace(batch, cell_prompt=True))
    assert three.parts["cell_prompt"].item() == 9.0 * num
    assert three.total.item() == 14.0 * num
    assert three.total.dtype == torch.float32


def test_a_model_without_its_predictions_is_refused():
    objective = make_objective()
    batch = objective.corrupt(make_batch([3], [50]), Draw(0))
    with pytest.raises(DataError, match=r"reads the prediction 'expression'.*\['token_logits'\]"):
        objective.loss(output(token_logits=torch.zeros(1)), batch)


def test_a_vocabulary_without_cls_is_refused():
    vocab = Vocab.from_genes(["A"], ["A"], specials=("<pad>",))
    with pytest.raises(DataError, match="no special token '<cls>'"):
        OBJECTIVE.build(GenerativeConfig(), vocab)


@pytest.mark.parametrize("ratios", [[0.0], [0.5, 1.0], [-0.1]])
def test_shares_must_be_between_zero_and_one(ratios):
    with pytest.raises(ConfigError, match="each must be above 0 and below 1"):
        build_section(GenerativeConfig, {"name": "generative", "mask_ratios": ratios})
